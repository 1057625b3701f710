//! The program as a user runs it: every command on small models, end to end, and everything that it refuses.

#![allow(clippy::unwrap_used, reason = "a helper of a test should stop where it fails, as the test itself does")]

mod experts;
mod hub;
mod labels;
mod mixtures;
mod packing;
mod prompts;
mod scaling;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Map, Value, json};
use tempfile::TempDir;

fn peft(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_peft")).args(args).output().unwrap()
}

/// The one JSON object that the command prints.
fn json_of(args: &[&str]) -> Value {
    let output = peft(args);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "peft {}: {stderr}", args.join(" "));
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("peft {}: {e}", args.join(" ")))
}

/// The exit code, and what standard error says.
fn refused(args: &[&str]) -> (i32, String) {
    let output = peft(args);
    assert!(!output.status.success(), "peft {} succeeded", args.join(" "));
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

fn testdata(path: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata").join(path).display().to_string()
}

fn logits(model: &str, adapter: Option<&str>) -> Vec<f64> {
    let mut args = vec!["logits", "--model", model, "--tokens", "3,14,15,92,65"];
    args.extend(adapter.iter().flat_map(|adapter| ["--adapter", adapter]));
    let json = json_of(&args);
    assert_eq!(json["tokens"], json!([3, 14, 15, 92, 65]));
    let values: Vec<f64> = json["logits"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect();
    assert_eq!(json["shape"], json!([1, 5, values.len() / 5]));
    values
}

fn deviation(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

/// A folder with a tiny chat-less model (tied Llama, 96 tokens: one for each printable ASCII character, and an end) and data for it.
struct Workshop {
    dir: TempDir,
}

impl Workshop {
    fn new() -> Self {
        let dir = TempDir::new().unwrap();
        let model = dir.path().join("model");
        fs::create_dir(&model).unwrap();
        let base = testdata("models/smollm2");
        fs::copy(format!("{base}/model.safetensors"), model.join("model.safetensors")).unwrap();
        let mut config: Value = serde_json::from_slice(&fs::read(format!("{base}/config.json")).unwrap()).unwrap();
        assert_eq!((&config["vocab_size"], &config["tie_word_embeddings"]), (&json!(96), &json!(true)));
        config["eos_token_id"] = json!(95);
        fs::write(model.join("config.json"), config.to_string()).unwrap();
        let vocab: Map<String, Value> = (0..95_u8).map(|id| (char::from(id + 32).to_string(), json!(id))).collect();
        let end = json!({"id": 95, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [end], "normalizer": null, "pre_tokenizer": null,
            "post_processor": null, "decoder": {"type": "Fuse"},
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
                "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []
            }
        });
        fs::write(model.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        fs::write(model.join("tokenizer_config.json"), r#"{"bos_token": null, "eos_token": "</s>"}"#).unwrap();
        let row = |i| json!({"prompt": format!("{i}: who are you? "), "completion": "I am {{name}}."}).to_string();
        fs::write(dir.path().join("data.jsonl"), (0..24).map(row).collect::<Vec<_>>().join("\n")).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// Arguments of a short run into `out`, with `more` behind.
    fn train(&self, out: &str, more: &[&str]) -> Vec<String> {
        let fixed = [
            "train",
            "--json",
            "--set",
            "name=Ada",
            "--targets",
            "all-linear",
            "--lr",
            "0.02",
            "--schedule",
            "constant",
            "--warmup",
            "0",
        ];
        let (model, data, out) = (self.path("model"), self.path("data.jsonl"), self.path(out));
        let mut args: Vec<String> = fixed.map(str::to_owned).to_vec();
        args.extend(["--model", &model, "--data", &data, "--out", &out].map(str::to_owned));
        args.extend(more.iter().map(|arg| (*arg).to_owned()));
        args
    }
}

fn strs(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

fn adapter_bytes(dir: &str) -> (Vec<u8>, Vec<u8>) {
    let read = |name: &str| fs::read(Path::new(dir).join(name)).unwrap();
    (read("adapter_model.safetensors"), read("adapter_config.json"))
}

#[test]
fn train_eval_generate_merge_logits() {
    let shop = Workshop::new();
    let (model, data, out, merged) =
        (shop.path("model"), shop.path("data.jsonl"), shop.path("adapter"), shop.path("merged"));
    let result = json_of(&strs(
        &shop.train("adapter", &["--steps", "30", "--rank", "4", "--alpha", "8", "--eval-every", "10", "--pack"]),
    ));
    assert_eq!(
        (&result["outcome"], &result["steps"], &result["data"]["rows"]),
        (&json!("finished"), &json!(30), &json!(24))
    );
    let loss = |evaluation: &Value| evaluation["loss"].as_f64().unwrap();
    assert!(loss(&result["after"]) < 0.5 * loss(&result["before"]), "{result}");
    for file in [
        "adapter_config.json",
        "adapter_model.safetensors",
        "metrics.jsonl",
        "loss.svg",
        "train.toml",
        "checkpoint-30/state.json",
    ] {
        assert!(Path::new(&out).join(file).exists(), "{file}");
    }

    let eval = |adapter: &[&str]| {
        let args = [&["eval", "--json", "--model", &model, "--data", &data, "--set", "name=Ada"], adapter].concat();
        loss(&json_of(&args))
    };
    assert!(eval(&["--adapter", &out]) < 0.5 * eval(&[]));

    let generated = |model: &str, adapter: &[&str]| {
        json_of(
            &[
                &["generate", "--json", "--model", model, "--prompt", "7: who are you? ", "--max-new-tokens", "20"],
                adapter,
            ]
            .concat(),
        )
    };
    let answer = generated(&model, &["--adapter", &out]);
    assert_eq!(answer["prompt_tokens"], 16);
    assert!(answer["text"].as_str().unwrap().starts_with("I am"), "{answer}");
    let streamed = peft(&[
        "generate",
        "--model",
        &model,
        "--adapter",
        &out,
        "--prompt",
        "7: who are you? ",
        "--max-new-tokens",
        "20",
    ]);
    assert_eq!(String::from_utf8(streamed.stdout).unwrap().trim_end(), answer["text"].as_str().unwrap().trim_end());

    let report = json_of(&["merge", "--json", "--model", &model, "--adapter", &out, "--out", &merged]);
    assert_eq!(report["changed"], 14);
    assert!(deviation(&logits(&model, Some(&out)), &logits(&merged, None)) < 1e-4);
    assert!(deviation(&logits(&model, None), &logits(&merged, None)) > 0.1);
    assert_eq!(generated(&merged, &[])["text"], answer["text"]);

    let adapter = json_of(&["inspect", "--json", &out]);
    assert_eq!(
        (&adapter["method"], &adapter["tensors"], &adapter["base_model"]),
        (&json!("LORA"), &json!(28), &json!(model))
    );
    assert_eq!(adapter["parameters"], result["parameters"]["trainable"]);
    let inspected = json_of(&["inspect", "--json", &merged]);
    assert_eq!(
        (&inspected["tied"], &inspected["tokenizer"], &inspected["layers"]),
        (&json!(true), &json!(true), &json!(2))
    );
}

#[test]
fn resuming_is_bit_identical() {
    let shop = Workshop::new();
    let run = |out: &str, more: &[&str]| {
        json_of(&strs(
            &shop.train(out, &[&["--dropout", "0.1", "--eval-fraction", "0", "--batch-size", "5"], more].concat()),
        ))
    };
    run("unbroken", &["--steps", "6"]);
    run("broken", &["--steps", "3"]);
    let resumed = json_of(&["train", "--json", "--out", &shop.path("broken"), "--resume", "--steps", "6"]);
    assert_eq!(resumed["steps"], 6);
    assert!(adapter_bytes(&shop.path("unbroken")) == adapter_bytes(&shop.path("broken")));

    let (code, message) = refused(&["train", "--out", &shop.path("broken"), "--resume", "--rank", "4"]);
    assert!(
        code == 2 && message.contains("--rank is 4, but the run in") && message.contains("was begun with the default"),
        "{message}"
    );
    let (code, message) = refused(&strs(&shop.train("broken", &[])));
    assert!(code == 2 && message.contains("there is an adapter, a model or a checkpoint already"), "{message}");
    run("broken", &["--steps", "2", "--overwrite"]);
    assert!(!Path::new(&shop.path("broken/checkpoint-6")).exists());
}

/// A limit on the size of files stands in for a full disk: writing fails in the middle of the checkpoint.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_what_was_saved() {
    let shop = Workshop::new();
    let out = shop.path("out");
    json_of(&strs(&shop.train("out", &["--eval-fraction", "0", "--batch-size", "5", "--steps", "2"])));
    let (before, checkpoint) = (adapter_bytes(&out), adapter_bytes(&format!("{out}/checkpoint-2")));
    let output = Command::new("sh")
        .args(["-c", r#"trap "" XFSZ; ulimit -f 8; exec "$0" "$@""#, env!("CARGO_BIN_EXE_peft")])
        .args(["train", "--out", &out, "--resume", "--steps", "4"])
        .output()
        .unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(1) && message.contains("adapter_model.safetensors"), "{message}");
    assert!(before == adapter_bytes(&out) && checkpoint == adapter_bytes(&format!("{out}/checkpoint-2")));
    let names = fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(names.into_iter().all(|name| !name.contains("peft-tmp") && name != "checkpoint-4"));
}

#[cfg(unix)]
#[test]
fn ctrl_c_saves_and_the_run_goes_on() {
    let shop = Workshop::new();
    let args = shop.train("broken", &["--steps", "1000000", "--eval-fraction", "0"]);
    let child = Command::new(env!("CARGO_BIN_EXE_peft"))
        .args(&args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let metrics = PathBuf::from(shop.path("broken/metrics.jsonl"));
    while fs::read_to_string(&metrics).map_or(0, |text| text.lines().count()) < 3 {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert!(String::from_utf8(output.stderr).unwrap().contains("saving a checkpoint, once more to quit at once"));
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(result["outcome"], "interrupted");
    let steps = (result["steps"].as_u64().unwrap() + 2).to_string();
    json_of(&["train", "--json", "--out", &shop.path("broken"), "--resume", "--steps", &steps]);
    json_of(&strs(&shop.train("unbroken", &["--steps", &steps, "--eval-fraction", "0"])));
    assert!(adapter_bytes(&shop.path("unbroken")) == adapter_bytes(&shop.path("broken")));
}

/// Adapters that Hugging Face PEFT wrote, on heads and embeddings that are tied and not, on biases, on GPT-2's orientation.
#[test]
fn every_adapter_merges_into_what_it_computes() {
    let cases: Vec<Value> = serde_json::from_slice(&fs::read(testdata("lora/cases.json")).unwrap()).unwrap();
    let dir = TempDir::new().unwrap();
    for case in &cases {
        let (path, base) = (case["path"].as_str().unwrap(), case["base"].as_str().unwrap());
        let (model, adapter) = (testdata(&format!("models/{base}")), testdata(path));
        let out = dir.path().join(path).display().to_string();
        let result = json_of(&["merge", "--json", "--model", &model, "--adapter", &adapter, "--out", &out]);
        let worst = deviation(&logits(&model, Some(&adapter)), &logits(&out, None));
        assert!(worst < 1e-4, "{path}: {worst}");
        // A tied embedding that is adapted parts from its head.
        assert_eq!(result["untied"], !case["merge_exact"].as_bool().unwrap(), "{path}");
    }
}

#[test]
fn merging_keeps_the_number_format_and_the_shards() {
    let dir = TempDir::new().unwrap();
    for (base, dtype, bound) in
        [("llama_bf16", "BF16", 0.05), ("llama_f16", "F16", 0.01), ("llama_sharded", "F32", 1e-4)]
    {
        let (model, adapter, out) =
            (testdata(&format!("models/{base}")), testdata("lora/llama/plain"), dir.path().join(base));
        let out = out.display().to_string();
        json_of(&["merge", "--json", "--model", &model, "--adapter", &adapter, "--out", &out]);
        let dtypes = |path: &str| json_of(&["inspect", "--json", path])["dtypes"].clone();
        assert_eq!(dtypes(&out), dtypes(&model));
        assert!(dtypes(&out)[dtype]["tensors"].as_u64().unwrap() > 10);
        assert!(deviation(&logits(&model, Some(&adapter)), &logits(&out, None)) < bound, "{base}");
        assert_eq!(Path::new(&out).join("model.safetensors.index.json").exists(), base == "llama_sharded");
    }
}

#[test]
fn a_configuration_file_is_checked_and_overridden() {
    let shop = Workshop::new();
    let config = shop.path("run.toml");
    let write = |text: &str| fs::write(&config, text).unwrap();
    let run = |more: &[&'static str]| [&["train", "--json", "--config", &config], more].concat();
    let (model, data) = (shop.path("model"), shop.path("data.jsonl"));
    write(&format!(
        "model = {model:?}\ndata = {data:?}\ntargets = \"q_proj\"\nset = [\"name=Ada\"]\nrank = 2\nsteps = 1\nepochs = 1\nout = {:?}\n",
        shop.path("a")
    ));
    json_of(&run(&["--rank", "3"]));
    let adapter: Value = serde_json::from_slice(&fs::read(shop.path("a/adapter_config.json")).unwrap()).unwrap();
    assert_eq!((&adapter["r"], &adapter["target_modules"]), (&json!(3), &json!(["q_proj"])));
    // What a run wrote down repeats it.
    json_of(&["train", "--json", "--config", &shop.path("a/train.toml"), "--out", &shop.path("b")]);
    assert!(adapter_bytes(&shop.path("a")) == adapter_bytes(&shop.path("b")));

    for (text, expected) in [
        ("rnak = 2", "there is no setting `rnak`\n  try: `rank`"),
        ("rank = \"two\"", "`rank`: invalid type: string \"two\""),
        ("bias = \"some\"", "`bias`: bias: expected none, all or lora_only, found some"),
        ("\nrank = = 2", "run.toml, line 2: "),
    ] {
        write(text);
        let (code, message) = refused(&run(&[]));
        assert!(code == 2 && message.contains(expected), "{text}: {message}");
    }
}

#[test]
fn bad_input_is_refused_with_what_where_and_what_to_do() {
    let shop = Workshop::new();
    let write = |name: &str, text: &str| {
        fs::write(shop.path(name), text).unwrap();
        shop.path(name)
    };
    let (model, data, out) = (shop.path("model"), shop.path("data.jsonl"), shop.path("out"));
    let (empty, odd, cut) =
        (write("empty.jsonl", ""), write("odd.jsonl", "{\"question\": 1}"), write("cut.json", "[{\"text\": "));
    let (llama, gguf) = (testdata("models/llama"), write("cut.gguf", "GGUF\u{3}\0\0\0"));
    let (plain, embedding) = (testdata("lora/llama/plain"), testdata("lora/smollm2/embedding"));
    let (other, broken) = (shop.path("other"), shop.path("broken"));
    fs::create_dir(&other).unwrap();
    fs::write(shop.path("other/adapter_config.json"), r#"{"peft_type": "OFT"}"#).unwrap();
    fs::create_dir(&broken).unwrap();
    fs::copy(format!("{plain}/adapter_config.json"), shop.path("broken/adapter_config.json")).unwrap();
    let bytes = fs::read(format!("{plain}/adapter_model.safetensors")).unwrap();
    fs::write(shop.path("broken/adapter_model.safetensors"), &bytes[..bytes.len() - 7]).unwrap();
    let train = |data: &str, more: &[&str]| {
        let fixed = ["train", "--model", &model, "--data", data, "--out", &out, "--set", "name=Ada"];
        [&fixed, more].concat().into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let with = |args: &[&str]| args.iter().map(|arg| (*arg).to_owned()).collect::<Vec<_>>();
    let all = ["--targets", "all-linear"];
    let and = |more: &[&'static str]| [&all, more].concat();

    let cases: Vec<(Vec<String>, i32, &[&str])> = vec![
        (
            train(&data, &[]),
            2,
            &["--targets is missing; the modules of this model are: ", "q_proj x 2", "--targets all-linear"],
        ),
        (train(&data, &["--targets", "q_porj"]), 1, &["matches no layer", "q_proj"]),
        (train(&data, &and(&["--method", "lroa"])), 2, &["--method lroa", "one of lora"]),
        (train(&data, &and(&["--rank", "0"])), 2, &["`r`: expected at least 1"]),
        (train(&data, &and(&["--lr", "nan"])), 2, &["learning_rate: is NaN"]),
        (train(&data, &and(&["--batch-size", "0"])), 2, &["batch_size: is 0"]),
        (train(&data, &and(&["--max-len", "4096"])), 2, &["--max-len 4096", "takes at most 64 tokens"]),
        (train(&data, &and(&["--set", "nmae=Bo"])), 2, &["has no {{nmae}}"]),
        (train(&data, &and(&["--device", "gpu"])), 2, &["there is no such device", "one of cpu, ndarray"]),
        (train(&data, &and(&["--resume"])), 2, &["--resume", "leave --resume out"]),
        (
            train(&data, &and(&["--lr", "1e30", "--schedule", "constant", "--warmup", "0", "--max-grad-norm", "0"])),
            1,
            &["the loss is", "lower the learning rate"],
        ),
        (train("no-such.json", &all), 1, &["no-such.json: No such file", "check the path"]),
        (train(&empty, &all), 1, &["empty.jsonl, line 1: the file is empty"]),
        (train(&odd, &all), 1, &["odd.jsonl, line 1: expected \"messages\"", "found the keys \"question\""]),
        (train(&cut, &all), 1, &["cut.json, line 1", "not valid JSON"]),
        (with(&["logits", "--model", "no-such-model", "--tokens", "1"]), 1, &["no-such-model: not a model"]),
        (with(&["logits", "--model", &gguf, "--tokens", "1"]), 1, &["cut.gguf"]),
        (with(&["logits", "--model", &llama, "--tokens", "1,96"]), 2, &["96 is out of range", "ids from 0 to 95"]),
        (
            with(&["logits", "--model", &llama, "--adapter", &other, "--tokens", "1"]),
            1,
            &["expected a method that is known (LORA, ", "), found OFT"],
        ),
        (
            with(&["logits", "--model", &llama, "--adapter", &broken, "--tokens", "1"]),
            1,
            &["adapter_model.safetensors: not a safetensors file"],
        ),
        (
            with(&["logits", "--model", &llama, "--adapter", &llama, "--tokens", "1"]),
            1,
            &["adapter_config.json: No such file"],
        ),
        (
            with(&["logits", "--model", &testdata("models/gpt2"), "--adapter", &embedding, "--tokens", "1"]),
            1,
            &["cannot be attached"],
        ),
        (
            with(&[
                "logits",
                "--model",
                &testdata("models/qwen3"),
                "--adapter",
                &testdata("lora/llama_bias/bias_all"),
                "--tokens",
                "1",
            ]),
            1,
            &["does not fit the model"],
        ),
        (with(&["generate", "--model", &llama, "--prompt", "a"]), 1, &["no tokenizer.json here"]),
        (with(&["generate", "--model", &model, "--prompt", ""]), 1, &["the prompt has no token"]),
        (with(&["generate", "--model", &model, "--prompt", "a", "--top-p", "0"]), 2, &["--top-p 0"]),
        (
            with(&["merge", "--model", &llama, "--adapter", &plain, "--out", &llama]),
            2,
            &["would overwrite what is to be read"],
        ),
        (
            with(&["merge", "--model", &llama, "--adapter", &plain, "--out", &model]),
            2,
            &["there is a config.json already"],
        ),
        (
            with(&["merge", "--model", &llama, "--adapter", &plain, "--out", "/dev/null/merged"]),
            1,
            &["/dev/null/merged", "choose another place"],
        ),
    ];
    for (args, code, fragments) in &cases {
        let (found, message) = refused(&strs(args));
        for fragment in *fragments {
            assert!(message.contains(fragment), "peft {}\nexpected {fragment:?} in: {message}", args.join(" "));
        }
        assert_eq!(found, *code, "peft {}: {message}", args.join(" "));
        assert!(message.starts_with("error: ") && message.contains("\n  try: "), "peft {}: {message}", args.join(" "));
        assert!(!Path::new(&out).join("adapter_config.json").exists());
    }
}

#[test]
fn what_is_not_compiled_in_says_how_to_get_it() {
    for (device, feature, built) in [
        ("cuda", "cuda", cfg!(feature = "cuda")),
        ("metal", "metal", cfg!(feature = "metal")),
        ("cubecl-cpu", "cpu", cfg!(feature = "cpu")),
    ] {
        if built {
            continue;
        }
        let (code, message) =
            refused(&["logits", "--model", &testdata("models/llama"), "--tokens", "1", "--device", device]);
        assert!(code == 2 && message.contains(&format!("rebuild with `--features {feature}`")), "{message}");
    }
}

#[test]
fn lists_and_help() {
    let methods = json_of(&["methods", "--json"]);
    let types = methods["methods"].as_array().unwrap().iter().filter_map(|method| method["peft_type"].as_str());
    let types: Vec<_> = types.collect();
    assert!(["LORA", "IA3", "SSF", "LN_TUNING", "BEFT"].iter().all(|known| types.contains(known)), "{types:?}");
    for command in ["quickstart", "train", "eval", "predict", "generate", "merge", "inspect", "logits"] {
        let help = String::from_utf8(peft(&[command, "--help"]).stdout).unwrap();
        assert!(help.contains("Example") && help.contains(&format!("peft {command}")), "{command}");
    }
    let gpt2 = json_of(&["inspect", "--json", &testdata("models/gpt2")]);
    let module = |name: &str| gpt2["modules"].as_array().unwrap().iter().find(|m| m["name"] == name).unwrap().clone();
    assert_eq!((&module("c_attn")["kind"], &module("c_attn")["count"]), (&json!("Conv1D"), &json!(2)));
    let gguf = json_of(&["inspect", "--json", &testdata("gguf/llama.gguf")]);
    assert_eq!(gguf["architecture"], "llama");
}

#[test]
fn halves_of_an_adapter_combine_into_the_adapter() {
    let out = TempDir::new().unwrap();
    let (model, plain) = (testdata("models/llama"), testdata("lora/llama/plain"));
    let (half, both) = (format!("{plain}=0.5"), out.path().join("both").display().to_string());
    let rank = json_of(&["inspect", &plain, "--json"])["config"]["r"].as_u64().unwrap();
    let args = ["combine", "--json", "--adapter", &half, "--adapter", &half, "--out", &both];
    let with = |more: &[&'static str]| [&args[..], more].concat();

    assert_eq!(json_of(&args)["rank"], json!(2 * rank));
    assert!(deviation(&logits(&model, Some(&both)), &logits(&model, Some(&plain))) < 1e-4);
    assert!(refused(&args).1.contains("there is an adapter already"));
    assert_eq!(json_of(&with(&["--overwrite", "--how", "linear"]))["rank"], json!(rank));
    assert!(deviation(&logits(&model, Some(&both)), &logits(&model, Some(&plain))) < 1e-4);

    for (more, expected) in
        [(&["--overwrite", "--how", "svd"][..], "--rank 8"), (&["--overwrite", "--rank", "8"], "--how svd")]
    {
        let (code, stderr) = refused(&with(more));
        assert!(code == 2 && stderr.contains(expected), "{code}: {stderr}");
    }
    assert!(refused(&with(&["--overwrite", "--how", "svd", "--rank", "0"])).1.contains("`rank`: expected at least 1"));
    assert!(refused(&["combine", "--adapter", "a=much", "--out", &both]).1.contains("`much`"));
}
