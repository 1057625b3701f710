//! Decoders with experts: equality with `transformers`, both forms of their files, adapters on them, and files that do not fit.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor, TensorData};
use peft_core::kernels::PackedMatrix;
use peft_core::{ParamVisitor, PathStack, Peft as _, Targets, merge, pack, scan, visit_params, with_auxiliary};
use peft_lora::LoraConfig;
use peft_models::checkpoint::Checkpoint;
use peft_models::config::ModelConfig;
use peft_models::export::{Dtype, save_model};
use peft_models::load::{Packing, Precision};
use peft_models::weights::Weights as _;
use peft_models::{CausalLm, KvCache, Layout, ModelSource, Pretrained, Sampling, generate, load_balancing_loss};
use peft_quant::{Code, Format, Quantization};

use crate::golden::{BOUND, deviation, floats, ints, logits, testdata};

const MODELS: [&str; 11] = [
    "mixtral",
    "mixtral_fused",
    "qwen2_moe",
    "qwen2_moe_fused",
    "qwen3_moe",
    "qwen3_moe_dense",
    "deepseek_v2",
    "deepseek_v2_groups",
    "deepseek_v3",
    "deepseek_v3_fused",
    "deepseek_v3_plain",
];

fn dir(name: &str) -> PathBuf {
    testdata().join("models-moe").join(name)
}

fn golden(name: &str) -> PathBuf {
    dir(name).join("logits.safetensors")
}

fn pretrained(dir: &Path, packing: &Packing, precision: Precision, device: &Device) -> Pretrained {
    Pretrained::load_with(&ModelSource::Dir(dir.to_owned()), packing, precision, device).unwrap()
}

fn model(name: &str) -> CausalLm {
    pretrained(&dir(name), &Packing::AsStored, Precision::F32, &Device::flex()).model
}

fn tokens(name: &str, device: &Device) -> Tensor<2, Int> {
    let (shape, tokens) = ints(&golden(name), "tokens");
    Tensor::from_data(TensorData::new(tokens, shape), device)
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

#[test]
fn logits_equal_transformers() {
    for name in MODELS {
        let found = deviation(&logits(&model(name), &golden(name)), &floats(&golden(name), "logits"));
        assert!(found < BOUND, "{name}: {found}");
    }
}

#[test]
fn routers_give_what_those_of_transformers_give() {
    for name in MODELS {
        let (_, routed) = model(name).routed(tokens(name, &Device::flex()), Layout::Rows, None);
        let bytes = std::fs::read(golden(name)).unwrap();
        let names = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let routers = names.names().into_iter().filter(|key| key.starts_with("router_logits.")).count();
        assert_eq!(routed.len(), routers, "{name}");
        for each in routed {
            let expected = floats(&golden(name), &format!("router_logits.{}", each.layer));
            assert_eq!(each.chosen.len() * each.logits.dims()[1] % expected.len(), 0, "{name}");
            let found = deviation(&values(each.logits), &expected);
            assert!(found < BOUND, "{name}, {}: {found}", each.layer);
        }
    }
}

#[test]
fn the_loss_of_balance_equals_transformers() {
    for name in ["mixtral", "qwen2_moe", "qwen3_moe"] {
        let (_, routed) = model(name).routed(tokens(name, &Device::flex()), Layout::Rows, None);
        let found = values(load_balancing_loss(&routed).unwrap());
        assert!(deviation(&found, &floats(&golden(name), "aux_loss")) < 1e-5, "{name}: {found:?}");
    }
    assert!(load_balancing_loss(&[]).is_none());
}

/// A copy of a golden model with some fields of its configuration changed.
fn changed(name: &str, fields: &[(&str, serde_json::Value)]) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    std::fs::copy(dir(name).join("model.safetensors"), copy.path().join("model.safetensors")).unwrap();
    let mut json: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(dir(name).join("config.json")).unwrap()).unwrap();
    for (field, value) in fields {
        json[field] = value.clone();
    }
    std::fs::write(copy.path().join("config.json"), json.to_string()).unwrap();
    copy
}

#[test]
fn what_routers_do_is_said_in_a_pass() {
    let name = "qwen2_moe";
    let said = |dir: &Path| {
        let model = pretrained(dir, &Packing::AsStored, Precision::F32, &Device::flex()).model;
        with_auxiliary(|| model.forward(tokens(name, &Device::flex()))).1
    };
    let plain = said(&dir(name));
    let paths: Vec<&str> = plain.iter().map(|each| each.path.as_str()).collect();
    assert_eq!(paths, ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]);
    for each in &plain {
        assert!(each.loss.is_none());
        assert!((values(each.load.clone()).iter().sum::<f32>() - 1.0).abs() < 1e-6);
        let entropy = values(each.entropy.clone())[0];
        assert!(entropy > 0.0 && entropy < 6.0_f32.ln(), "{entropy}");
    }
    let fields = [("output_router_logits", true.into()), ("router_aux_loss_coef", 0.5.into())];
    let losses: Vec<f32> =
        said(changed(name, &fields).path()).into_iter().filter_map(|each| each.loss).flat_map(values).collect();
    assert!(deviation(&losses, &[0.5 * floats(&golden(name), "aux_loss")[0]]) < 1e-5, "{losses:?}");
}

#[test]
fn greedy_generation_equals_transformers_and_the_cache_changes_nothing() {
    for name in ["mixtral", "qwen2_moe", "deepseek_v3", "qwen3_moe_dense", "deepseek_v2"] {
        let model = model(name);
        let prompt: Vec<u32> = ints(&golden(name), "tokens").1[..4].iter().map(|id| *id as u32).collect();
        let found = generate(&model, &prompt, 8, Sampling::default(), &[], &Device::flex(), |_| true).unwrap();
        if !["qwen3_moe_dense", "deepseek_v2"].contains(&name) {
            let expected: Vec<u32> = ints(&golden(name), "greedy").1.iter().map(|id| *id as u32).collect();
            assert_eq!(found, expected, "{name}");
        }
        let ids = tokens(name, &Device::flex());
        let mut cache = KvCache::default();
        let steps =
            (0..ids.dims()[1]).map(|at| model.hidden(ids.clone().narrow(1, at, 1), Layout::Rows, Some(&mut cache)));
        let steps = values(Tensor::cat(steps.collect::<Vec<_>>(), 1));
        let whole = values(model.hidden(ids.clone(), Layout::Rows, None));
        assert!(deviation(&steps, &whole) < BOUND, "{name}");
    }
}

#[test]
fn logits_over_bfloat16_are_near() {
    for name in MODELS {
        let expected = floats(&golden(name), "logits");
        let largest = expected.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
        let model = pretrained(&dir(name), &Packing::AsStored, Precision::Bf16, &Device::flex()).model;
        let found = deviation(&logits(&model, &golden(name)), &expected) / largest;
        assert!(found > 1e-5 && found < 0.1, "{name}: {found}");
    }
}

#[test]
fn logits_over_packed_layers_are_near() {
    let packing = Packing::Quantize(Quantization::new(Format { code: Code::Int8, block: 32, double_quant: false }));
    for name in MODELS {
        let expected = floats(&golden(name), "logits");
        let largest = expected.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
        let model = pretrained(&dir(name), &packing, Precision::F32, &Device::flex()).model;
        let found =
            logits(&model, &golden(name)).into_iter().zip(&expected).map(|(found, value)| (found - value).abs());
        // In the mean: a token may go through another expert where two are nearly equal.
        let found = found.sum::<f32>() / expected.len() as f32 / largest;
        assert!(found > 1e-6 && found < 0.02, "{name}: {found}");
    }
}

/// Packed experts give what dense ones of the values that are left give, and take the room of what is packed.
#[test]
fn experts_are_packed_each_for_itself() {
    let quantization = Quantization::new(Format::NF4);
    for name in ["mixtral", "qwen2_moe_fused", "deepseek_v3"] {
        let dense = model(name);
        let packed = pretrained(&dir(name), &Packing::Quantize(quantization.clone()), Precision::F32, &Device::flex());
        let sites = scan(&packed.model).sites;
        let experts: Vec<_> = sites.iter().filter(|site| site.experts.is_some()).collect();
        assert!(!experts.is_empty() && experts.iter().all(|site| site.packed.is_some()), "{name}");
        let of_dense: Vec<_> = scan(&dense).sites.into_iter().filter(|site| site.experts.is_some()).collect();
        let shape = |site: &peft_core::Site| (site.path.clone(), site.experts, site.d_in, site.d_out);
        assert_eq!(
            experts.iter().map(|site| shape(site)).collect::<Vec<_>>(),
            of_dense.iter().map(shape).collect::<Vec<_>>()
        );
        assert_eq!(packed.model.trainable().total, dense.trainable().total, "{name}");
        // Without an adapter there is nothing to merge but what is packed.
        let unpacked = merge(packed.model.clone(), &LoraConfig::default()).unwrap();
        assert!(scan(&unpacked).sites.iter().all(|site| site.packed.is_none()), "{name}");
        let (found, expected) = (logits(&packed.model, &golden(name)), logits(&unpacked, &golden(name)));
        assert!(deviation(&found, &expected) < 1e-5, "{name}: {}", deviation(&found, &expected));
        let site = of_dense.first().unwrap();
        let matrix = |shape: [usize; 2]| {
            let values = Format::NF4.pack(&vec![0.5; shape.iter().product()]).unwrap();
            PackedMatrix::new(values.into_matrix(shape).unwrap(), &Device::flex())
        };
        let refused = |matrices: Vec<PackedMatrix>, with: &str| {
            let error = pack(dense.clone(), [(site.id, matrices)].into()).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains(with), "{error}");
        };
        let count = site.experts.unwrap();
        refused(vec![matrix([site.d_out, site.d_in])], &format!("expected {count} packed matrices, found 1"));
        refused((0..count).map(|_| matrix([site.d_in, site.d_out])).collect(), "expected shape");
        let again = peft_quant::quantize(dense.clone(), &quantization).unwrap();
        assert_eq!(logits(&again, &golden(name)), found, "{name}");
    }
}

#[test]
fn routers_are_neither_packed_nor_taken_for_linear_layers() {
    let packing = Packing::Quantize(Quantization::default());
    let model = pretrained(&dir("qwen2_moe"), &packing, Precision::F32, &Device::flex()).model;
    let packed = |name: &str| {
        scan(&model).sites.into_iter().filter(|s| s.path.ends_with(name)).all(|site| site.packed.is_some())
    };
    assert!(packed("q_proj") && packed("shared_expert.up_proj") && packed("experts.down_proj") && !packed("mlp.gate"));
    let adapted = |targets: Targets| {
        let method = LoraConfig { targets, ..LoraConfig::default() };
        scan(&crate::experts::model("qwen2_moe").attach(&method).unwrap()).adapted
    };
    let all = adapted(Targets::pattern("all-linear"));
    assert!(all.contains("model.layers.0.mlp.shared_expert_gate") && !all.contains("model.layers.0.mlp.gate"));
    assert!(adapted(Targets::modules(["gate"])).contains("model.layers.1.mlp.gate"));
}

/// Which parameters have gradients.
struct Moved<'a>(&'a burn::tensor::Gradients, Vec<String>);

impl ParamVisitor for Moved<'_> {
    fn float<const D: usize>(&mut self, at: &PathStack, param: &burn::module::Param<Tensor<D>>) {
        if param.val().grad(self.0).is_some() {
            self.1.push(at.path());
        }
    }
}

#[test]
fn lora_trains_through_frozen_experts() {
    let device = Device::flex().autodiff();
    for name in ["mixtral", "qwen3_moe_dense", "deepseek_v2", "deepseek_v3_plain"] {
        let base = pretrained(&dir(name), &Packing::AsStored, Precision::F32, &device).model;
        let method = LoraConfig { targets: Targets::modules(["q_proj", "gate"]), ..LoraConfig::default() };
        let model = base.attach(&method).unwrap();
        let grads = model.forward(tokens(name, &device)).powf_scalar(2.0).mean().backward();
        let mut moved = Moved(&grads, Vec::new());
        visit_params(&model, &mut moved);
        let sites = scan(&model).adapted.len();
        assert_eq!(moved.1.len(), 2 * sites, "{name}: {:?}", moved.1);
        assert!(moved.1.iter().all(|path| path.contains("lora")), "{name}: {:?}", moved.1);
        // The first matrix has no gradient before the second moves; that one has, in the router too.
        assert!(moved.1.iter().any(|path| path.contains("mlp.gate")));
    }
}

#[test]
fn a_model_is_written_as_transformers_writes_it() {
    for (name, per_expert) in
        [("mixtral_fused", "mixtral"), ("qwen2_moe", "qwen2_moe"), ("qwen3_moe_dense", "qwen3_moe_dense")]
    {
        let out = tempfile::tempdir().unwrap();
        let read = pretrained(&dir(name), &Packing::AsStored, Precision::F32, &Device::flex());
        save_model(&read.model, &read.files.config, None, Dtype::F32, out.path()).unwrap();
        let (found, expected) = (Checkpoint::open(out.path()).unwrap(), Checkpoint::open(&dir(per_expert)).unwrap());
        assert_eq!(found.tensors(), expected.tensors());
        for info in found.tensors() {
            assert_eq!(found.bytes(info).unwrap(), expected.bytes(info).unwrap(), "{}", info.name);
        }
    }
}

fn refused(dir: &Path) -> String {
    Pretrained::load(&ModelSource::Dir(dir.to_owned()), &Device::flex()).map(|_| ()).unwrap_err().to_string()
}

#[test]
fn version_4_configs_mean_the_same() {
    for name in ["deepseek_v2_groups", "deepseek_v3"] {
        let read = |file: &str| {
            let path = dir(name).join(file);
            let json = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
            ModelConfig::from_json(&json, &path).unwrap()
        };
        assert_eq!(read("config.json"), read("config_v4.json"));
    }
}

#[test]
fn blocks_beyond_those_of_the_model_are_left_out() {
    // DeepSeek-V3's files end in a block that predicts one token more.
    let name = "deepseek_v3";
    let copy = changed(name, &[("num_hidden_layers", 1.into())]);
    let model = pretrained(copy.path(), &Packing::AsStored, Precision::F32, &Device::flex()).model;
    assert!(scan(&model).modules.keys().all(|path| !path.starts_with("model.layers.1")));
    assert!(refused(changed("mixtral", &[("num_hidden_layers", 1.into())]).path()).contains("not part of this model"));
}

/// Each golden model with one field changed is refused by a message with these words.
fn all_refused(cases: &[(&str, &str, serde_json::Value, &str)]) {
    for (name, field, value, expected) in cases {
        let message = refused(changed(name, &[(field, value.clone())]).path());
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn configurations_that_do_not_fit_are_refused() {
    let down = "mlp.experts.down_proj: expected shape [5, 32, 24], found [4, 32, 24]";
    let gate_up = "mlp.experts.gate_up_proj: expected shape [4, 50, 32], found [4, 48, 32]";
    let (nothing, positive) = (serde_json::Value::Null, "expected a positive whole number, found");
    all_refused(&[
        (
            "mixtral",
            "num_experts_per_tok",
            5.into(),
            "`num_experts_per_tok`: expected at most the 4 experts of a block",
        ),
        ("mixtral", "num_local_experts", 5.into(), down),
        ("mixtral_fused", "intermediate_size", 25.into(), gate_up),
        ("qwen2_moe", "num_experts", nothing, &format!("`num_experts`: {positive} nothing")),
        ("qwen2_moe", "moe_intermediate_size", 0.into(), &format!("`moe_intermediate_size`: {positive} 0")),
        ("qwen3_moe", "decoder_sparse_step", 0.into(), &format!("`decoder_sparse_step`: {positive} 0")),
        ("qwen3_moe", "mlp_only_layers", "first".into(), "`mlp_only_layers`: expected a list of numbers of blocks"),
        ("qwen3_moe", "mlp_only_layers", serde_json::json!([1]), "model.layers.1.mlp.gate_proj.weight: missing"),
    ]);
}

#[test]
fn configurations_of_deepseek_that_do_not_fit_are_refused() {
    let divisor = "`n_group`: expected a divisor of 8 that leaves at least 2 experts to a group";
    let chosen = "`num_experts_per_tok`: expected at most the 2 experts of the chosen groups";
    all_refused(&[
        ("deepseek_v3", "n_group", 3.into(), divisor),
        ("deepseek_v3", "n_group", 8.into(), divisor),
        ("deepseek_v3", "topk_group", 5.into(), "`topk_group`: expected at most the 4 groups, found 5"),
        ("deepseek_v3", "topk_group", 1.into(), chosen),
        ("deepseek_v2", "topk_method", "other".into(), "`topk_method` \"other\""),
        ("deepseek_v2", "qk_rope_head_dim", 5.into(), "`qk_rope_head_dim`: expected an even number"),
        ("deepseek_v2", "kv_lora_rank", 12.into(), "self_attn.kv_a_layernorm.weight: expected shape [12]"),
        ("deepseek_v2", "v_head_dim", serde_json::Value::Null, "`v_head_dim`: expected a positive whole number"),
    ]);
}

#[test]
fn an_expert_that_is_missing_is_named() {
    for (tensor, expected) in [
        (
            "block_sparse_moe.experts.1.w3",
            "model.layers.0.mlp.experts.gate_up_proj: the up projection of expert 1 is missing",
        ),
        (
            "block_sparse_moe.experts.3.w3",
            "model.layers.0.mlp.experts.gate_up_proj: the up projection of expert 3 is missing",
        ),
        (
            "block_sparse_moe.experts.0.w2",
            "model.layers.0.mlp.experts.down_proj: the down projection of expert 0 is missing",
        ),
        ("block_sparse_moe.experts.3.w2", "mlp.experts.down_proj: expected shape [4, 32, 24], found [3, 32, 24]"),
    ] {
        let copy = changed("mixtral", &[]);
        let path = copy.path().join("model.safetensors");
        let bytes = std::fs::read(&path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let left = file.tensors().into_iter().filter(|(name, _)| *name != format!("model.layers.0.{tensor}.weight"));
        std::fs::write(&path, safetensors::serialize(left, None).unwrap()).unwrap();
        let message = refused(copy.path());
        assert!(message.contains(expected), "{message}");
    }
}
