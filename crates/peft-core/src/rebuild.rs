//! Adapters as values, out of a module.

use std::any::Any;
use std::collections::BTreeMap;

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use crate::{Method, ParamMapper, ParamVisitor, PathStack, Result, Site, map_params, visit_params};

/// The parameters of adapters by the path of their layer and the field. A visitor sees an adapter's parameters and never the adapter, so a new one is made and given
/// them.
#[derive(Default)]
pub(crate) struct Adapters(BTreeMap<String, Fields>);

type Fields = BTreeMap<String, Box<dyn Any>>;

impl Adapters {
    pub(crate) fn of<T: Module>(module: &T) -> Self {
        let mut adapters = Self::default();
        visit_params(module, &mut adapters);
        adapters
    }

    /// The adapter at that site.
    pub(crate) fn take<M: Method>(&mut self, method: &M, site: &Site) -> Result<Option<M::Adapter>> {
        let Some(mut fields) = self.0.remove(&site.path) else { return Ok(None) };
        Ok(Some(map_params(method.init(site, 0)?, &mut fields)))
    }
}

impl ParamVisitor for Adapters {
    fn float<const D: usize>(&mut self, at: &PathStack, param: &Param<Tensor<D>>) {
        let location = at.locate();
        if let Some(field) = location.field {
            self.0.entry(location.module).or_default().insert(field, Box::new(param.clone()));
        }
    }
}

impl ParamMapper for Fields {
    fn float<const D: usize>(&mut self, at: &PathStack, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let given = self.remove(&at.path()).and_then(|given| given.downcast().ok());
        given.map_or(param, |given| *given)
    }
}
