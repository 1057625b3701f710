//! The bytes of bitsandbytes, made by `tools/golden/quant.py`.

#![allow(clippy::unwrap_used, reason = "a helper of a test should stop where it fails, as the test itself does")]

use std::path::Path;

use peft_quant::{Code4, Packed, Statistics};
use safetensors::{Dtype, SafeTensors};

fn floats(tensors: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let view = tensors.tensor(name).unwrap();
    let bytes = view.data();
    match view.dtype() {
        Dtype::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::BF16 => bytes.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::F16 => bytes.as_chunks().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32()).collect(),
        other => panic!("{name}: {other:?}"),
    }
}

#[test]
fn the_same_weights_give_the_same_bytes() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/quant");
    let mut cases = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "safetensors") {
            continue;
        }
        cases += 1;
        let case = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let file = std::fs::read(&path).unwrap();
        let tensors = SafeTensors::deserialize(&file).unwrap();
        let code = if case.starts_with("nf4") { Code4::Nf4 } else { Code4::Fp4 };
        let state = format!("w.weight.quant_state.bitsandbytes__{}", &case[..3]);
        let state: serde_json::Value = serde_json::from_slice(tensors.tensor(&state).unwrap().data()).unwrap();
        let block = usize::try_from(state["blocksize"].as_u64().unwrap()).unwrap();
        let nested = state.get("nested_offset").is_some();

        let packed = Packed::pack(&floats(&tensors, "dense"), code, block, nested).unwrap();
        assert_eq!(floats(&tensors, "w.weight.quant_map"), code.values(), "{case}");
        assert_eq!(packed.codes(), tensors.tensor("w.weight").unwrap().data(), "{case}");
        match packed.statistics() {
            Statistics::Plain(absmax) => assert_eq!(*absmax, floats(&tensors, "w.weight.absmax"), "{case}"),
            Statistics::Nested { codes, scales, offset } => {
                assert_eq!(*offset, state["nested_offset"].as_f64().unwrap() as f32, "{case}");
                assert_eq!(codes, tensors.tensor("w.weight.absmax").unwrap().data(), "{case}");
                assert_eq!(*scales, floats(&tensors, "w.weight.nested_absmax"), "{case}");
            }
        }
        if tensors.tensor("unpacked").is_ok() {
            let dtype = tensors.tensor("unpacked").unwrap().dtype();
            let unpacked = packed.unpack().into_iter().map(|value| match dtype {
                Dtype::BF16 => half::bf16::from_f32(value).to_f32(),
                _ => value,
            });
            assert!(unpacked.eq(floats(&tensors, "unpacked")), "{case}");
        }
    }
    assert_eq!(cases, 10);
}
