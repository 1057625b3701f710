//! The laws for a composition of adapters.

use burn::module::Module as _;
use peft_core::{Composable, ComposedConfig, Composition, Method as _, Result, Site};
use serde_json::json;

use crate::Laws;

/// The laws for a stack of the first of three adapters and the mean of the others.
///
/// # Errors
/// As [`ComposedConfig::new`].
pub fn composition_laws<M: Composable>(adapters: [M; 3]) -> Result<Laws<ComposedConfig<M>>> {
    let one = Composition::Adapter;
    let stack = Composition::Stack(vec![one(0), Composition::Average(vec![(1.0, one(1)), (3.0, one(2))])]);
    let method = ComposedConfig::new(adapters.into(), stack)?;
    Ok(Laws::new(method, params, ("composition", json!({ "stack": [] })))
        .skip("file", "keys of parts have numbers, which a list of keys cannot have")
        .skip("encoder", "each adapter names its own layers"))
}

/// Those of its adapters that are there.
fn params<M: Composable>(method: &ComposedConfig<M>, site: &Site) -> usize {
    method.init(site, 0).map_or(0, |adapter| adapter.num_params())
}
