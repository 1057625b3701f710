//! The bytes of bitsandbytes, made by `tools/golden/quant.py`: packing, reading, writing and unpacking.

#![allow(clippy::unwrap_used, reason = "a helper of a test should stop where it fails, as the test itself does")]

use std::collections::BTreeMap;
use std::path::Path;

use peft_quant::{BnbWeight, Code, Error, Packed, Statistics, Stored};
use safetensors::{Dtype, SafeTensors};

type Tensors = BTreeMap<String, Stored>;

/// The files by name.
fn cases() -> BTreeMap<String, Tensors> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/quant");
    let mut cases = BTreeMap::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let file = std::fs::read(&path).unwrap();
            let tensors = SafeTensors::deserialize(&file).unwrap().tensors().into_iter().map(|(name, view)| {
                (name, Stored { dtype: view.dtype(), shape: view.shape().to_vec(), data: view.data().to_vec() })
            });
            cases.insert(path.file_stem().unwrap().to_str().unwrap().to_owned(), tensors.collect());
        }
    }
    assert_eq!(cases.len(), 10);
    cases
}

fn floats(stored: &Stored) -> Vec<f32> {
    let bytes = &stored.data;
    match stored.dtype {
        Dtype::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::BF16 => bytes.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::F16 => bytes.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
        other => panic!("{other:?}"),
    }
}

fn read(tensors: &Tensors) -> Result<Option<BnbWeight>, Error> {
    BnbWeight::read("w.weight", |name| tensors.get(name).cloned())
}

#[test]
fn the_same_weights_give_the_same_bytes() {
    for (case, mut tensors) in cases() {
        let weight = read(&tensors).unwrap().unwrap();
        let code = if case.starts_with("nf4") { Code::Nf4 } else { Code::Fp4 };
        let nested = matches!(weight.packed.statistics(), Statistics::Nested { .. });
        assert_eq!((weight.packed.code(), nested), (code, case.contains("nested") || case.contains("4096")), "{case}");
        let (dense, unpacked) = (tensors.remove("dense").unwrap(), tensors.remove("unpacked"));
        assert_eq!(weight.shape, dense.shape, "{case}");

        let packed = Packed::pack(&floats(&dense), code, weight.packed.block(), nested).unwrap();
        assert_eq!(packed, weight.packed, "{case}");
        assert_eq!(weight.write("w.weight"), tensors, "{case}");
        if let Some(unpacked) = unpacked {
            let round = |value| match unpacked.dtype {
                Dtype::BF16 => half::bf16::from_f32(value).to_f32(),
                Dtype::F16 => half::f16::from_f32(value).to_f32(),
                _ => value,
            };
            assert!(packed.unpack().into_iter().map(round).eq(floats(&unpacked)), "{case}");
        }
    }
}

#[test]
fn what_is_missing_or_does_not_fit_is_named() {
    let whole = cases().remove("nf4_nested").unwrap();
    let part = |suffix: &str| format!("w.weight{suffix}");
    assert_eq!(read(&Tensors::new()), Ok(None));
    for suffix in ["", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"] {
        let mut tensors = whole.clone();
        tensors.remove(&part(suffix));
        assert_eq!(read(&tensors), Err(Error::Missing { name: part(suffix) }));
        for length in [0, 3, 4] {
            let mut tensors = whole.clone();
            tensors.get_mut(&part(suffix)).unwrap().data.truncate(length);
            assert!(read(&tensors).is_err(), "{suffix} cut to {length}");
        }
    }
    let state = part(".quant_state.bitsandbytes__nf4");
    for (from, to) in [
        ("160, 128", "4611686018427387904, 8"),
        ("160, 128", "9223372036854775807, 1"),
        ("160, 128", "1, 128"),
        ("\"blocksize\": 64", "\"blocksize\": 0"),
        ("\"nested_blocksize\": 256", "\"nested_blocksize\": 128"),
        ("{", "["),
    ] {
        let mut tensors = whole.clone();
        let stored = tensors.get_mut(&state).unwrap();
        let text = String::from_utf8(stored.data.clone()).unwrap();
        assert!(text.contains(from), "{text}");
        stored.data = text.replacen(from, to, 1).into_bytes();
        assert!(read(&tensors).is_err(), "{from} -> {to}");
    }
}

/// Another release may round the map otherwise: the values are those of the file's own map.
#[test]
fn another_map_counts_by_its_values() {
    let mut tensors = cases().remove("nf4_nested").unwrap();
    let expected = read(&tensors).unwrap().unwrap();
    let map = tensors.get_mut("w.weight.nested_quant_map").unwrap();
    let mut values = floats(map);
    values.iter_mut().for_each(|value| *value *= 1.0 + f32::EPSILON);
    map.data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let found = read(&tensors).unwrap().unwrap();
    assert!(matches!(found.packed.statistics(), Statistics::Plain(_)));
    let largest = expected.packed.unpack().into_iter().zip(found.packed.unpack()).map(|(a, b)| (a - b).abs());
    assert!(largest.fold(0.0, f32::max) < 1e-6);
}
