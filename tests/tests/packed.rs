//! Models with packed weights: those of bitsandbytes, ours, and GGUF's own blocks.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor, TensorData};
use peft_core::scan;
use peft_models::load::{Packing, Precision};
use peft_models::quantize::save_packed;
use peft_models::{CausalLm, ModelSource, Pretrained};
use peft_quant::{Code, Format, Quantization};
use peft_testkit::{Golden, difference, read};
use safetensors::SafeTensors;

fn testdata(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata").join(path)
}

fn model(dir: &Path, packing: &Packing) -> CausalLm {
    Pretrained::load_with(&ModelSource::Dir(dir.to_owned()), packing, Precision::F32, &Device::flex()).unwrap().model
}

fn logits(model: &CausalLm, golden: &Golden) -> Vec<f64> {
    let ids = TensorData::new(golden.tokens.clone(), [golden.batch, golden.seq]);
    read(model.forward(Tensor::<2, Int>::from_data(ids, &Device::flex()))).unwrap()
}

fn packed_layers(model: &CausalLm) -> usize {
    scan(model).sites.iter().filter(|site| site.packed.is_some()).count()
}

const CASES: [(&str, &str, Format, usize); 3] = [
    ("llama", "llama_nf4", Format::NF4, 7),
    ("llama", "llama_fp4", Format { code: Code::Fp4, block: 64, double_quant: false }, 7),
    ("gpt2", "gpt2_nf4", Format::NF4, 4),
];

/// Packed as they are stored, and unpacked while they are read.
#[test]
fn checkpoints_of_bitsandbytes_give_their_logits() {
    for (_, case, _, layers) in CASES {
        let dir = testdata("bnb").join(case);
        let golden = Golden::read(&dir.join("logits.safetensors")).unwrap();
        for (packing, expected) in [(Packing::AsStored, layers), (Packing::Dense, 0)] {
            let model = model(&dir, &packing);
            assert_eq!(packed_layers(&model), expected, "{case}");
            let off = difference(&logits(&model, &golden), &golden.logits);
            assert!(off < 1e-4, "{case}, {packing:?}: {off}");
        }
    }
}

/// The file that bitsandbytes writes for the same weights, byte for byte; and packing while reading gives the same model.
#[test]
fn the_same_dense_weights_give_the_same_file() {
    for (base, case, format, layers) in CASES {
        let (base, dir) = (testdata("bnb").join(base), testdata("bnb").join(case));
        let out = tempfile::tempdir().unwrap();
        let files = ModelSource::Dir(base.clone()).open().unwrap();
        let quantization = Quantization::new(format);
        let summary = save_packed(&files, &quantization, out.path(), &Device::flex(), |_| ()).unwrap();
        assert_eq!(summary.weights, layers);
        let [ours, theirs] = [out.path(), &dir].map(|dir| std::fs::read(dir.join("model.safetensors")).unwrap());
        let (found, expected) = (SafeTensors::deserialize(&ours).unwrap(), SafeTensors::deserialize(&theirs).unwrap());
        for (name, tensor) in expected.tensors() {
            let found = found.tensor(&name).unwrap_or_else(|_| panic!("{case}: {name} is missing"));
            assert!(
                (found.dtype(), found.shape(), found.data()) == (tensor.dtype(), tensor.shape(), tensor.data()),
                "{case}: {name}"
            );
        }
        assert!(ours == theirs, "{case}: the files differ");

        let golden = Golden::read(&dir.join("logits.safetensors")).unwrap();
        let [read, packed] = [model(out.path(), &Packing::AsStored), model(&base, &Packing::Quantize(quantization))]
            .map(|model| logits(&model, &golden));
        assert_eq!(read, packed, "{case}");
    }
}

/// Codes that bitsandbytes has not come back from our own files.
#[test]
fn other_codes_come_back_from_their_files() {
    let base = testdata("bnb/llama");
    let golden = Golden::read(&base.join("logits.safetensors")).unwrap();
    let dense = logits(&model(&base, &Packing::Dense), &golden);
    for (code, double_quant, bound) in
        [(Code::Int8, true, 0.2), (Code::Int8, false, 0.2), (Code::Int4, true, 8.0), (Code::Int4Affine, false, 8.0)]
    {
        let mut quantization = Quantization::new(Format { code, block: 32, double_quant });
        if code != Code::Int8 {
            quantization.pattern.insert("down_proj".to_owned(), Format::NF4);
        }
        let out = tempfile::tempdir().unwrap();
        let files = ModelSource::Dir(base.clone()).open().unwrap();
        save_packed(&files, &quantization, out.path(), &Device::flex(), |_| ()).unwrap();
        let [read, packed] = [model(out.path(), &Packing::AsStored), model(&base, &Packing::Quantize(quantization))];
        assert_eq!(packed_layers(&read), 7);
        let (read, packed) = (logits(&read, &golden), logits(&packed, &golden));
        assert_eq!(read, packed, "{code:?}");
        let off = difference(&read, &dense);
        assert!(off > 0.0 && off < bound, "{code:?}: {off}");
    }
}
