//! How much of a model is trained.

use std::fmt;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Int, Tensor};
use peft_kernels::PackedLayout;
use serde::Serialize;

use crate::{ParamVisitor, PathStack, visit_params};

/// Counts of parameters and of the bytes that hold them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Parameters that an optimizer step changes.
    pub trainable: usize,
    /// All parameters, adapter included.
    pub total: usize,
    /// Bytes of the trained parameters.
    pub trainable_bytes: usize,
    /// Bytes of all parameters.
    pub total_bytes: usize,
}

impl Report {
    /// Trained share of all parameters, in percent.
    pub fn percent(&self) -> f64 {
        100.0 * self.trainable as f64 / self.total.max(1) as f64
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const MIB: f64 = 1024.0 * 1024.0;
        write!(
            f,
            "{} of {} parameters trained ({:.3} %), {:.2} of {:.2} MiB",
            self.trainable,
            self.total,
            self.percent(),
            self.trainable_bytes as f64 / MIB,
            self.total_bytes as f64 / MIB
        )
    }
}

/// Counts the parameters of `module`. A packed weight counts as many as it stands for, in the bytes that its packed tensors take.
pub fn report<M: Module>(module: &M) -> Report {
    let mut report = Report::default();
    visit_params(module, &mut report);
    module.visit(&mut Packed { stack: PathStack::default(), report: &mut report });
    report
}

impl ParamVisitor for Report {
    fn float<const D: usize>(&mut self, _at: &PathStack, param: &Param<Tensor<D>>) {
        let count = param.lazy_shape().num_elements();
        let bytes = if param.is_initialized() { count * param.base().dtype().size() } else { count * size_of::<f32>() };
        self.total += count;
        self.total_bytes += bytes;
        if param.is_require_grad() {
            self.trainable += count;
            self.trainable_bytes += bytes;
        }
    }

    fn packed(&mut self, _at: &PathStack, layout: PackedLayout) {
        self.total += layout.len();
    }
}

/// Adds the bytes of packed weights, and integer parameters.
struct Packed<'a> {
    stack: PathStack,
    report: &'a mut Report,
}

impl ModuleVisitor for Packed<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.stack.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.stack.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        // What is no vector there is no part of the weight: the placeholder in which the adapter sits.
        if D == 1 && self.stack.in_packing() {
            self.report.total_bytes += param.lazy_shape().num_elements() * size_of::<f32>();
        }
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        let tensor = param.val();
        let count = tensor.shape().num_elements();
        self.report.total_bytes += count * tensor.dtype().size();
        if !self.stack.in_packing() {
            self.report.total += count;
        }
    }
}
