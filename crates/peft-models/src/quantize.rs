//! Writing a model with packed weights: the Hugging Face directory that `transformers` and bitsandbytes write, byte for byte.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use burn::module::Param;
use burn::tensor::{Device, Tensor};
use peft_core::files::transpose;
use peft_core::{LayerKind, ParamVisitor, PathStack, Site, hf_name, scan, visit_params};
use peft_quant::{BnbWeight, Code, Format, Quantization};
use rayon::prelude::*;
use safetensors::Dtype;
use serde::Serialize;
use serde_json::{Value, json};

use crate::export::{OutFile, Raw, to_raw, write_files};
use crate::load::HfTensor;
use crate::weights::{TensorInfo, Weights};
use crate::{CausalLm, Error, ModelFiles, Origin, Result};

/// What packing a model came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Summary {
    /// Weights that were packed.
    pub weights: usize,
    /// Values in them.
    pub values: usize,
    /// Bytes that they take, tables and states included.
    pub bytes: usize,
    /// Bytes of all other tensors.
    pub other_bytes: usize,
}

/// Writes the model of `files` into `dir` with linear layers packed as `quantization` says; all other tensors, those of experts too, go over as they are, those of a GGUF file
/// in F16. Weights are read, packed and written a file at a time, on all cores. `on_tensor` hears of each tensor.
///
/// # Errors
/// When the model cannot be read, holds packed weights already, has a weight that is not finite, or the file system refuses.
pub fn save_packed(
    files: &ModelFiles,
    quantization: &Quantization,
    dir: &Path,
    device: &Device,
    on_tensor: impl Fn(&TensorInfo) + Sync,
) -> Result<Summary> {
    let (weights, shards) = match &files.origin {
        Origin::Checkpoint(checkpoint) if checkpoint.is_packed() => {
            return Err(Error::Unsupported {
                what: format!("{}: packing weights that are packed already", files.name),
                hint: "begin with the model in 16 or 32 bits".to_owned(),
            });
        }
        Origin::Checkpoint(checkpoint) => (checkpoint as &dyn Weights, checkpoint.out_files()),
        Origin::Gguf(gguf) => {
            let tensors = gguf.tensors().iter().map(|info| (info, Dtype::F16)).collect();
            (gguf.as_ref() as &dyn Weights, vec![OutFile { at: 0, file: "model.safetensors".to_owned(), tensors }])
        }
    };
    let chosen = choose(files, quantization, device)?;
    let values = chosen.values().map(|(site, _)| site.d_in * site.d_out).sum();
    let mut summary = Summary { values, ..Summary::default() };
    let mut tensors = shards.iter().flat_map(|shard| &shard.tensors);
    let compute = tensors.find(|(info, _)| chosen.contains_key(&info.name)).map_or(Dtype::F32, |(_, dtype)| *dtype);
    let mut config = files.config.clone();
    config["quantization_config"] = quantization_config(quantization, compute);
    write_files(shards, &config, files.tokenizer().ok(), dir, |shard| {
        let written = shard.tensors.par_iter().map(|(info, dtype)| {
            on_tensor(info);
            let Some((site, format)) = chosen.get(&info.name) else {
                let raw = match &files.origin {
                    Origin::Checkpoint(base) => Raw::copy(base, info, *dtype)?,
                    Origin::Gguf(_) => {
                        let tensor = HfTensor { shape: info.shape.clone(), values: weights.read(info)? };
                        to_raw(info.name.clone(), *dtype, tensor, dir)?
                    }
                };
                return Ok((false, vec![raw]));
            };
            Ok((true, packed(weights, info, site, *format, *dtype)?))
        });
        let mut tensors = Vec::new();
        for (packed, mut parts) in written.collect::<Result<Vec<_>>>()? {
            let bytes: usize = parts.iter().map(|part| part.bytes.len()).sum();
            if packed {
                summary.weights += 1;
                summary.bytes += bytes;
            } else {
                summary.other_bytes += bytes;
            }
            tensors.append(&mut parts);
        }
        Ok(tensors)
    })?;
    Ok(summary)
}

/// The tensors to pack, by the name that the source gives them.
fn choose(files: &ModelFiles, quantization: &Quantization, device: &Device) -> Result<HashMap<String, (Site, Format)>> {
    /// Names of the weights by their ids.
    #[derive(Default)]
    struct Namer(HashMap<burn::module::ParamId, String>);

    impl ParamVisitor for Namer {
        fn float<const D: usize>(&mut self, at: &PathStack, param: &Param<Tensor<D>>) {
            self.0.insert(param.id, hf_name(&at.locate(), D).name);
        }
    }

    let model = CausalLm::new(&files.model_config()?, device);
    let mut namer = Namer::default();
    visit_params(&model, &mut namer);
    let mut chosen = HashMap::new();
    // `transformers` has no packed form of the weights of several experts in one tensor.
    for site in scan(&model).sites.into_iter().filter(|site| site.experts.is_none()) {
        let Some(name) = namer.0.remove(&site.id) else { continue };
        let weights = files.origin.weights();
        let (Some(info), Some(format)) = (weights.find_parameter(&name), quantization.format_of(&site)?) else {
            continue;
        };
        let mut expected = [site.d_in, site.d_out];
        if site.kind == LayerKind::Linear {
            expected.reverse();
        }
        if info.shape != expected {
            let problem = format!("  - {}: expected shape {expected:?}, found {:?}", info.name, info.shape);
            return Err(Error::Weights { path: weights.path().to_owned(), problems: vec![problem] });
        }
        chosen.insert(info.name.clone(), (site, format));
    }
    Ok(chosen)
}

/// The tensors of a packed weight.
fn packed(weights: &dyn Weights, info: &TensorInfo, site: &Site, format: Format, dtype: Dtype) -> Result<Vec<Raw>> {
    let values = weights.read(info)?;
    // GPT-2's layers are stored the other way; packed, all are the rows of a linear layer.
    let rows = if site.kind == LayerKind::Conv1D { transpose(&values, site.d_in, site.d_out) } else { values };
    let packed = format.pack(&rows).map_err(|e| Error::format(weights.path(), format!("{}: {e}", info.name)))?;
    let weight = BnbWeight { packed, shape: vec![site.d_out, site.d_in], dtype: python_name(dtype).to_owned() };
    let raw = |(name, stored): (String, peft_quant::Stored)| Raw {
        name,
        dtype: stored.dtype,
        shape: stored.shape,
        bytes: stored.data,
    };
    Ok(weight.write(&info.name).into_iter().map(raw).collect())
}

/// What PyTorch calls a type that weights are unpacked to.
fn python_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F16 => "float16",
        Dtype::BF16 => "bfloat16",
        _ => "float32",
    }
}

/// What tells `transformers` that the weights are packed. Codes that bitsandbytes has not are named as this project's own, so that it refuses them
/// by name instead of reading nonsense.
fn quantization_config(quantization: &Quantization, compute: Dtype) -> Value {
    let skip = &quantization.skip;
    let Format { code, block, double_quant } = quantization.format;
    let formats: BTreeMap<&String, String> =
        quantization.pattern.iter().map(|(name, format)| (name, format.to_string())).collect();
    let known = |format: &Format| matches!(format.code, Code::Nf4 | Code::Fp4);
    if !(known(&quantization.format) && quantization.pattern.values().all(known)) {
        return json!({ "quant_method": "peft", "quant_type": code.name(), "block_size": block, "double_quant": double_quant,
            "skip_modules": skip, "patterns": formats });
    }
    json!({
        "_load_in_4bit": true,
        "_load_in_8bit": false,
        "bnb_4bit_compute_dtype": python_name(compute),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": code.name(),
        "bnb_4bit_use_double_quant": double_quant,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": if *skip == Quantization::default().skip { Value::Null } else { json!(skip) },
        "llm_int8_threshold": 6.0,
        "load_in_4bit": true,
        "load_in_8bit": false,
        "quant_method": "bitsandbytes",
    })
}
