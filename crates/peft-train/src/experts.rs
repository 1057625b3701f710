//! What the routers of mixtures do during training: losses of balance, and the load of each expert in each layer.

use burn::tensor::{DType, ExecutionError, Tensor};
use indexmap::IndexMap;
use peft_core::Auxiliary;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::heat::{Cell, Row, heat_map};

/// What routers did in the steps since the record before, in the mean.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExpertRecord {
    /// Optimizer steps done.
    pub step: usize,
    /// The losses of balance of all layers together, which are in no other record.
    pub loss: f64,
    /// Entropy of the probabilities of experts, over all layers, in nats.
    pub entropy: f64,
    /// For each layer, the part of the rows that went through each expert; it sums to one.
    pub load: IndexMap<String, Vec<f64>>,
}

/// What was heard from routers, summed on the device until somebody asks.
#[derive(Default)]
pub(crate) struct Heard {
    /// How often.
    passes: usize,
    layers: Vec<Auxiliary>,
}

impl Heard {
    /// Adds what routers said in one pass, and gives the sum of their losses.
    pub(crate) fn add(&mut self, said: Vec<Auxiliary>) -> Option<Tensor<1>> {
        if said.is_empty() {
            return None;
        }
        self.passes += 1;
        let loss = said.iter().filter_map(|each| each.loss.clone()).reduce(|sum, loss| sum + loss);
        let plain = |tensor: Tensor<1>| tensor.inner();
        let new = said.into_iter().map(|each| Auxiliary {
            path: each.path,
            loss: each.loss.map(plain),
            load: plain(each.load),
            entropy: plain(each.entropy),
        });
        if self.layers.is_empty() {
            self.layers = new.collect();
        } else {
            for (sum, each) in self.layers.iter_mut().zip(new) {
                sum.loss = sum.loss.take().zip(each.loss).map(|(sum, loss)| sum + loss);
                sum.load = sum.load.clone() + each.load;
                sum.entropy = sum.entropy.clone() + each.entropy;
            }
        }
        loss
    }

    /// What was heard since this was asked before.
    pub(crate) fn record(&mut self, step: usize) -> std::result::Result<Option<ExpertRecord>, ExecutionError> {
        let Self { passes, layers } = std::mem::take(self);
        if layers.is_empty() {
            return Ok(None);
        }
        // One transfer for all.
        let parts = layers.iter().flat_map(|layer| {
            let loss = layer.loss.clone().unwrap_or_else(|| layer.entropy.zeros_like());
            [loss, layer.entropy.clone(), layer.load.clone()].map(|part| part.cast(DType::F32))
        });
        let values = Tensor::cat(parts.collect(), 0) / passes as f64;
        let mut values = values.try_into_data()?.iter::<f64>().collect::<Vec<_>>().into_iter();
        let (mut loss, mut entropy, mut load) = (0.0, 0.0, IndexMap::new());
        for layer in &layers {
            loss += values.next().unwrap_or_default();
            entropy += values.next().unwrap_or_default() / layers.len() as f64;
            load.insert(layer.path.clone(), values.by_ref().take(layer.load.dims()[0]).collect());
        }
        Ok(Some(ExpertRecord { step, loss, entropy, load }))
    }
}

/// Draws a row for each layer and a column for each expert; the darker a cell, the more rows went through.
///
/// # Errors
/// When there is nothing to draw.
pub fn expert_load(record: &ExpertRecord) -> Result<String> {
    let most = record.load.values().map(Vec::len).max().unwrap_or_default();
    let columns: Vec<String> = (0..most).map(|expert| expert.to_string()).collect();
    let common = common(record.load.keys().map(String::as_str));
    let row = |(path, load): (&String, &Vec<f64>)| {
        // Twice its share is as dark as it gets.
        let cell = |part: &f64| Cell { part: part * load.len() as f64 / 2.0, text: format!("{:.0}", 100.0 * part) };
        Row { name: path[common..].to_owned(), cells: load.iter().map(cell).collect() }
    };
    let rows: Vec<Row> = record.load.iter().map(row).collect();
    heat_map("percent of the rows by layer (rows) and expert (columns)", &columns, &rows)
}

/// How many bytes all paths begin with, up to a dot.
fn common<'a>(paths: impl Iterator<Item = &'a str>) -> usize {
    let same = |a: &'a str, b: &'a str| {
        let count = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
        &a[..a[..count].rfind('.').map_or(0, |dot| dot + 1)]
    };
    let mut paths = paths.peekable();
    let first = paths.peek().copied().unwrap_or_default();
    let whole = &first[..first.rfind('.').map_or(0, |dot| dot + 1)];
    paths.fold(whole, same).len()
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    fn said(load: [f32; 2]) -> Vec<Auxiliary> {
        let device = Device::flex().autodiff();
        let one = |value: f32| Tensor::<1>::from_floats([value], &device);
        let each = |path: &str, loss| Auxiliary {
            path: path.to_owned(),
            loss,
            load: Tensor::from_floats(load, &device),
            entropy: one(0.5),
        };
        vec![each("layers.0.up", Some(one(2.0))), each("layers.1.up", None)]
    }

    #[test]
    fn what_is_heard_is_the_mean() {
        let mut heard = Heard::default();
        assert!(heard.add(Vec::new()).is_none() && heard.record(0).unwrap().is_none());
        let loss = heard.add(said([1.0, 0.0])).unwrap();
        assert_eq!(loss.into_data().iter::<f32>().collect::<Vec<_>>(), [2.0]);
        heard.add(said([0.5, 0.5]));
        let record = heard.record(7).unwrap().unwrap();
        assert_eq!((record.step, record.loss, record.entropy), (7, 2.0, 0.5));
        assert_eq!(record.load["layers.1.up"], [0.75, 0.25]);
        assert!(heard.record(8).unwrap().is_none());
        let svg = expert_load(&record).unwrap();
        assert!(svg.contains("\n75\n") && svg.contains("\n1.up\n"), "{svg}");
    }
}
