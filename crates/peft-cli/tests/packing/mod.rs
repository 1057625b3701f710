//! Packed weights on the command line.

use super::*;

/// The same arguments with another value of a flag.
pub(crate) fn with(mut args: Vec<String>, flag: &str, value: &str) -> Vec<String> {
    let at = args.iter().position(|arg| arg == flag).unwrap();
    args[at + 1] = value.to_owned();
    args
}

/// Over packed weights everything works as over dense ones: in memory, from files, merged into either.
#[test]
fn packed_weights_are_trained_over_measured_and_merged() {
    let shop = Workshop::new();
    let (model, data, packed) = (shop.path("model"), shop.path("data.jsonl"), shop.path("packed"));
    let result = json_of(&["quantize", "--json", "--model", &model, "--out", &packed]);
    assert_eq!(result["packed"]["weights"], json!(14));
    // Most of it tables: the layers have a few hundred values each.
    assert!(result["bits_per_value"].as_f64().unwrap() < 12.0, "{result}");
    let config: Value = serde_json::from_slice(&fs::read(format!("{packed}/config.json")).unwrap()).unwrap();
    assert_eq!(config["quantization_config"]["quant_method"], json!("bitsandbytes"));

    let run = |out: &str, model: &str, more: &[&str]| {
        let more = [&["--steps", "20", "--rank", "4", "--eval-every", "10"], more].concat();
        let result = json_of(&strs(&with(shop.train(out, &more), "--model", model)));
        let loss = |evaluation: &Value| evaluation["loss"].as_f64().unwrap();
        assert!(loss(&result["after"]) < 0.7 * loss(&result["before"]), "{result}");
        adapter_bytes(&shop.path(out))
    };
    // Packed while it is read or packed in its files, a model is the same.
    let in_memory = run("in-memory", &model, &["--quantize", "nf4"]);
    let from_files = run("from-files", &packed, &[]);
    assert!(in_memory.0 == from_files.0);
    assert!(in_memory.0 != run("dense", &model, &[]).0);

    let adapter = shop.path("in-memory");
    let eval = |more: &[&str]| {
        let fixed = ["eval", "--json", "--data", &data, "--set", "name=Ada"];
        json_of(&[&fixed, more].concat())["loss"].as_f64().unwrap()
    };
    let over_packed = eval(&["--model", &model, "--quantize", "nf4", "--adapter", &adapter]);
    assert_eq!(over_packed, eval(&["--model", &packed, "--adapter", &adapter]));
    let merge = |out: &str, more: &[&str]| {
        let out = shop.path(out);
        (json_of(&[&["merge", "--json", "--adapter", &adapter, "--out", &out], more].concat()), out)
    };
    let (result, unpacked) = merge("unpacked", &["--model", &model, "--quantize", "nf4", "--into", "unpacked"]);
    let truth = result["truth"].as_array().unwrap();
    assert_eq!(truth.len(), 14);
    assert!(truth.iter().all(|layer| layer["mean_error"].as_f64().unwrap() > 0.0), "{result}");
    assert!((eval(&["--model", &unpacked]) - over_packed).abs() < 1e-5);
    let (result, of_files) = merge("of-files", &["--model", &packed]);
    assert_eq!(result["truth"], json!(null));
    assert!((eval(&["--model", &of_files]) - over_packed).abs() < 1e-5);
    let (_, original) = merge("original", &["--model", &model, "--quantize", "nf4"]);
    assert!((eval(&["--model", &original]) - eval(&["--model", &model, "--adapter", &adapter])).abs() < 1e-5);
    assert!((eval(&["--model", &original]) - over_packed).abs() > 1e-4);
}

/// It makes up for a part of what packing loses, and is refused on weights that have lost nothing.
#[test]
fn loftq_belongs_to_the_packed_weights() {
    let shop = Workshop::new();
    let (model, data) = (shop.path("model"), shop.path("data.jsonl"));
    // No step at all: what counts is where the adapter starts.
    let start = |out: &str, init: &str| {
        let more = ["--steps", "1", "--rank", "16", "--quantize", "int4", "--init", init];
        json_of(&strs(&with(shop.train(out, &more), "--lr", "1e-12")));
        shop.path(out)
    };
    let (plain, loftq) = (start("plain", "kaiming"), start("loftq", "loftq"));
    let logits = |more: &[&str]| {
        let json = json_of(&[&["logits", "--tokens", "3,14,15,92,65", "--model", &model], more].concat());
        json["logits"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect::<Vec<_>>()
    };
    let dense = logits(&[]);
    let off = |adapter: &str| deviation(&logits(&["--quantize", "int4", "--adapter", adapter]), &dense);
    assert!(off(&loftq) < 0.7 * off(&plain), "{} {}", off(&loftq), off(&plain));
    let (code, stderr) =
        refused(&["eval", "--model", &model, "--adapter", &loftq, "--data", &data, "--set", "name=Ada"]);
    assert!(code == 1 && stderr.contains("made on another base"), "{stderr}");
    let (code, stderr) = refused(&strs(&shop.train("none", &["--init", "loftq"])));
    assert!(code == 2 && stderr.contains("--quantize"), "{stderr}");
}

#[test]
fn packing_refuses_what_makes_no_sense() {
    let shop = Workshop::new();
    let (model, packed) = (shop.path("model"), shop.path("packed"));
    json_of(&[
        "quantize",
        "--json",
        "--model",
        &model,
        "--out",
        &packed,
        "--type",
        "int8",
        "--pattern",
        "down_proj=nf4",
    ]);
    let again = shop.path("again");
    // What is stored packed stays so, unless it is to be unpacked first.
    let logits = |more: &[&str]| json_of(&[&["logits", "--model", &packed, "--tokens", "3,14"], more].concat());
    assert!(logits(&["--quantize", "nf4"]) == logits(&[]));
    assert!(logits(&["--quantize", "nf4", "--unpack"]) != logits(&[]));
    for (args, code, said) in [
        (vec!["quantize", "--model", &model, "--out", &packed], 2, "there is a config.json already"),
        (vec!["quantize", "--model", &packed, "--out", &again], 1, "packed already"),
        (vec!["quantize", "--model", &model, "--out", &model, "--overwrite"], 2, "overwrite what is to be read"),
        (vec!["quantize", "--model", &model, "--out", &again, "--block", "48"], 2, "a power of two"),
        (vec!["quantize", "--model", &model, "--out", &again, "--type", "nf5"], 2, "possible values"),
        (vec!["quantize", "--model", &model, "--out", &again, "--pattern", "q_proj=nf5"], 2, "there is no type nf5"),
    ] {
        let (found, stderr) = refused(&args);
        assert!(found == code && stderr.contains(said), "peft {}: {found}, {stderr}", args.join(" "));
    }
    json_of(&strs(&shop.train("adapter", &["--steps", "1"])));
    let adapter = shop.path("adapter");
    let (code, stderr) =
        refused(&["merge", "--model", &model, "--adapter", &adapter, "--out", &again, "--into", "unpacked"]);
    assert!(code == 2 && stderr.contains("--into unpacked: no weight"), "{stderr}");
    assert!(!Path::new(&again).exists(), "a refused command wrote something");
    let (_, stderr) = refused(&strs(&shop.train("none", &["--quantize", "nf4", "--modules-to-save", "down_proj"])));
    assert!(stderr.contains("down_proj: the weight is packed"), "{stderr}");
}

#[test]
fn a_run_over_bfloat16_goes_on_in_bfloat16_and_says_how_to_use_it() {
    let shop = Workshop::new();
    let losses = ["f32", "bf16"].map(|precision| {
        let flags = ["--steps", "4", "--precision", precision];
        json_of(&strs(&shop.train(precision, &flags)))["after"]["loss"].as_f64().unwrap()
    });
    let difference = (losses[0] - losses[1]).abs();
    assert!(difference > 0.0 && difference < 0.02 * losses[0], "{losses:?}");
    let settings = fs::read_to_string(shop.path("bf16/train.toml")).unwrap();
    assert!(settings.contains("precision = \"bf16\""), "{settings}");

    // What is trained whole is not frozen: it is f32, as small steps need it, in memory and in the file.
    let whole = ["--steps", "4", "--precision", "bf16", "--modules-to-save", "lm_head,embed_tokens"];
    let result = json_of(&strs(&shop.train("whole", &whole)));
    assert!(result["after"]["loss"].as_f64().unwrap() < losses[1], "{result}");
    let bytes = fs::read(shop.path("whole/adapter_model.safetensors")).unwrap();
    let end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Map<String, Value> = serde_json::from_slice(&bytes[8..end]).unwrap();
    let tensors = header.iter().filter(|(name, _)| *name != "__metadata__");
    assert!(tensors.clone().count() > 14 && tensors.into_iter().all(|(_, tensor)| tensor["dtype"] == "F32"));

    let (model, data, out) = (shop.path("model"), shop.path("data.jsonl"), shop.path("refused"));
    let train = ["train", "--model", &model, "--data", &data, "--out", &out, "--precision", "bf16"];
    let (code, message) = refused(&[&train[..], &["--quantize", "nf4", "--init", "loftq"]].concat());
    assert!(code == 2 && message.contains("--precision f32"), "{message}");
    let (code, message) =
        refused(&["logits", "--model", &model, "--tokens", "3", "--precision", "bf16", "--device", "ndarray"]);
    assert!(code == 1 && message.contains("bfloat16 on this device"), "{message}");
}
