//! `LoRA` that starts from factors which something else has found: what packing loses, a part of the weight, another adapter.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::Module;
use peft_core::files::{Values, transpose};
use peft_core::{AdapterFile, Error, LayerKind, Method as _, Result, Strictness, attach, scan};

use crate::LoraConfig;

/// Attaches `method`, and starts each layer that `factors` names at `y = x·W + x·A·B`: `A` is `[d_in, rank]`, `B` `[rank, d_out]`, row-major, their
/// product the whole update. All other adapters start as `method` says.
///
/// # Errors
/// As [`attach`]; and when a factor has another shape than the adapter, or its layer has none. All of them at once.
pub fn attach_factors<T: Module>(
    module: T,
    method: &LoraConfig,
    factors: &BTreeMap<String, (Vec<f32>, Vec<f32>)>,
    seed: u64,
) -> Result<T> {
    let module = attach(module, method, seed)?;
    let mut file = AdapterFile::collect(&module, method)?;
    let sites = scan(&module).sites;
    for (path, (a, b)) in factors {
        let site = sites.iter().find(|site| site.path == *path);
        let (kind, d_in, d_out) = site.map_or((LayerKind::Linear, 0, 0), |site| (site.kind, site.d_in, site.d_out));
        let (rank, scale) = (method.rank_of(path)?, method.scale_of(path)? as f32);
        if scale == 0.0 {
            return Err(Error::config("lora_alpha", "a number other than 0, for the factors to count", 0));
        }
        let b: Vec<f32> = b.iter().map(|value| value / scale).collect();
        for (field, factor) in [("a", transposed(a, d_in, rank)), ("b", transposed(&b, rank, d_out))] {
            let tensor = LoraConfig::tensors(kind).iter().find(|tensor| tensor.field == field);
            file.tensors.insert(format!("{path}.{}", tensor.map_or(field, |tensor| tensor.key)), factor);
        }
    }
    file.fill(module, Path::new("the factors"), Strictness::default())
}

/// A factor as the file holds it. One of the wrong length keeps it, so that it is refused with what was expected.
fn transposed(values: &[f32], rows: usize, columns: usize) -> Values {
    if values.len() == rows * columns {
        Values { shape: vec![columns, rows], values: transpose(values, rows, columns) }
    } else {
        Values { shape: vec![values.len()], values: values.to_vec() }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, Device, Tensor};
    use peft_core::{Targets, linear};
    use peft_testkit::{Stack, difference, read};

    use super::*;

    #[test]
    fn an_adapter_starts_at_the_product_of_its_factors() {
        let device = Device::flex();
        let base = Stack::new(&device, DType::F32, true);
        let method = LoraConfig::new(2, Targets::modules(["up", "down"])).with_alpha(6.0);
        let values = |count: usize| (0..count).map(|at| (at as f32 * 0.7).sin()).collect::<Vec<_>>();
        let (a, b) = (values(16 * 2), values(2 * 32));
        let factors = BTreeMap::from([("up".to_owned(), (a.clone(), b.clone()))]);
        let model = attach_factors(base.clone(), &method, &factors, 0).unwrap();
        let x = Tensor::<2>::random([3, 16], burn::tensor::Distribution::Default, &device);
        let tensor = |values: &[f32], shape| {
            Tensor::<2>::from_data(burn::tensor::TensorData::new(values.to_vec(), shape), &device)
        };
        let expected = linear(&base.up, x.clone()) + x.clone().matmul(tensor(&a, [16, 2])).matmul(tensor(&b, [2, 32]));
        assert!(difference(&read(linear(&model.up, x)).unwrap(), &read(expected).unwrap()) < 1e-5);
        let x = Tensor::<2>::ones([1, 32], &device);
        assert_eq!(read(linear(&model.down, x.clone())).unwrap(), read(linear(&base.down, x)).unwrap());
        let refused = |path: &str, b: &[f32]| {
            let factors = BTreeMap::from([(path.to_owned(), (a.clone(), b.to_vec()))]);
            attach_factors(base.clone(), &method, &factors, 0).unwrap_err().to_string()
        };
        assert!(refused("up", &b[..10]).contains("up.lora_B.weight: expected shape [32, 2], found [10]"));
        assert!(refused("embed", &b).contains("embed.lora_embedding_A: not part of this adapter"));
    }
}
