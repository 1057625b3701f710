//! Traversals that know where they are: Burn's visitor and mapper, with the path stack kept for them.
//!
//! A packed weight is no float parameter: what stands in its place and what it is made of are not shown. Nor is what stands in the place of a sub-layer.

use std::collections::HashSet;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::Tensor;
use peft_kernels::PackedLayout;

use crate::PathStack;
use crate::quantized::placeholders;

/// Reads parameters, each with its place.
pub trait ParamVisitor {
    /// Called for each float parameter.
    fn float<const D: usize>(&mut self, at: &PathStack, param: &Param<Tensor<D>>);

    /// Called for each packed matrix: of experts for that of each.
    fn packed(&mut self, at: &PathStack, layout: PackedLayout) {
        let _ = (at, layout);
    }
}

/// Replaces parameters, each with its place.
pub trait ParamMapper {
    /// Called for each float parameter; gives what takes its place.
    fn float<const D: usize>(&mut self, at: &PathStack, param: Param<Tensor<D>>) -> Param<Tensor<D>>;
}

/// Shows every parameter of `module` to `visitor`, those of adapters included.
pub fn visit_params<T: Module>(module: &T, visitor: &mut impl ParamVisitor) {
    module.visit(&mut Walk::new(module, visitor));
}

/// Puts every parameter of `module` through `mapper`, those of adapters included.
pub fn map_params<T: Module>(module: T, mapper: &mut impl ParamMapper) -> T {
    let mut walk = Walk::new(&module, mapper);
    module.map(&mut walk)
}

struct Walk<'a, T> {
    stack: PathStack,
    placeholders: HashSet<ParamId>,
    inner: &'a mut T,
}

impl<'a, T> Walk<'a, T> {
    fn new(module: &impl Module, inner: &'a mut T) -> Self {
        Self { stack: PathStack::default(), placeholders: placeholders(module), inner }
    }

    /// Whether the parameter is there for a packed weight or an adapter only.
    fn hides(&self, id: ParamId) -> bool {
        self.stack.in_packing() || self.placeholders.contains(&id) || self.stack.locate().is_place()
    }
}

impl<V: ParamVisitor> ModuleVisitor for Walk<'_, V> {
    fn enter_module(&mut self, name: &str, container: &str) {
        if let Some(layout) = PackedLayout::announced(container) {
            self.inner.packed(&self.stack, layout);
        }
        self.stack.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.stack.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if !self.hides(param.id) {
            self.inner.float(&self.stack, param);
        }
    }
}

impl<M: ParamMapper> ModuleMapper for Walk<'_, M> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.stack.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.stack.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.hides(param.id) { param } else { self.inner.float(&self.stack, param) }
    }
}
