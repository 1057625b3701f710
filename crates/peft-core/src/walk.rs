//! Traversals that know where they are: Burn's visitor and mapper, with the path stack kept for them.

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::Tensor;

use crate::PathStack;

/// Reads parameters, each with its place.
pub trait ParamVisitor {
    /// Called for each float parameter.
    fn float<const D: usize>(&mut self, at: &PathStack, param: &Param<Tensor<D>>);
}

/// Replaces parameters, each with its place.
pub trait ParamMapper {
    /// Called for each float parameter; gives what takes its place.
    fn float<const D: usize>(&mut self, at: &PathStack, param: Param<Tensor<D>>) -> Param<Tensor<D>>;
}

/// Shows every parameter of `module` to `visitor`, those of adapters included.
pub fn visit_params<T: Module>(module: &T, visitor: &mut impl ParamVisitor) {
    module.visit(&mut Walk { stack: PathStack::default(), inner: visitor });
}

/// Puts every parameter of `module` through `mapper`, those of adapters included.
pub fn map_params<T: Module>(module: T, mapper: &mut impl ParamMapper) -> T {
    module.map(&mut Walk { stack: PathStack::default(), inner: mapper })
}

struct Walk<'a, T> {
    stack: PathStack,
    inner: &'a mut T,
}

impl<V: ParamVisitor> ModuleVisitor for Walk<'_, V> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.stack.enter(name, container);
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.stack.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.inner.float(&self.stack, param);
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
        self.inner.float(&self.stack, param)
    }
}
