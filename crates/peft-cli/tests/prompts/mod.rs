//! Prompt methods on the command line.

use super::*;

/// Arguments of a short run of `method` into a folder of its name, without targets.
fn train(shop: &Workshop, method: &str, more: &[&str]) -> Vec<String> {
    let mut args = shop.train(method, &[&["--method", method, "--steps", "30", "--eval-every", "10"], more].concat());
    let at = args.iter().position(|arg| arg == "--targets").unwrap();
    args.drain(at..at + 2);
    args
}

/// Each learns, generates and evaluates from its folder; and a run that is cut and goes on ends as one that was not.
#[test]
fn prompts_are_trained_used_and_resumed() {
    let shop = Workshop::new();
    let (model, data) = (shop.path("model"), shop.path("data.jsonl"));
    let methods: [(&str, &[&str]); 6] = [
        ("prompt", &["--num-virtual-tokens", "8", "--prompt-labels", "Ada,name"]),
        ("prefix", &["--num-virtual-tokens", "4", "--prompt-text", "I am Ada."]),
        ("p-tuning", &["--num-virtual-tokens", "4", "--encoder", "lstm", "--encoder-hidden-size", "8"]),
        ("p-tuning-v2", &["--num-virtual-tokens", "4", "--prefix-projection", "--encoder-hidden-size", "8"]),
        ("llama-adapter", &["--num-virtual-tokens", "4"]),
        ("mam", &["--num-virtual-tokens", "4", "--encoder-hidden-size", "8", "--reduction-factor", "4"]),
    ];
    for (method, more) in methods {
        let result = json_of(&strs(&train(&shop, method, more)));
        let loss = |evaluation: &Value| evaluation["loss"].as_f64().unwrap();
        assert!(loss(&result["after"]) < 0.95 * loss(&result["before"]), "{method}: {result}");
        let out = shop.path(method);
        let evaluated =
            json_of(&["eval", "--json", "--model", &model, "--adapter", &out, "--data", &data, "--set", "name=Ada"]);
        assert!(evaluated["loss"].as_f64().unwrap() < loss(&result["before"]), "{method}: {evaluated}");
        assert!(deviation(&logits(&model, Some(&out)), &logits(&model, None)) > 1e-3, "{method} changes nothing");
        let generated =
            peft(&["generate", "--model", &model, "--adapter", &out, "--prompt", "who?", "--max-new-tokens", "4"]);
        assert!(generated.status.success(), "{method}: {}", String::from_utf8_lossy(&generated.stderr));
        // The same steps in two runs: what an encoder has learned goes on as well.
        let cut = format!("{method}-cut");
        let mut first = train(&shop, method, &[more, &["--steps", "12", "--save-every", "12"]].concat());
        let at = first.iter().position(|arg| *arg == out).unwrap();
        first[at] = shop.path(&cut);
        let keep: Vec<String> = without(&first, "30");
        json_of(&strs(&keep));
        json_of(&["train", "--json", "--out", &shop.path(&cut), "--resume", "--steps", "30"]);
        assert_eq!(adapter_bytes(&shop.path(&cut)), adapter_bytes(&out), "{method}");
    }
    for method in ["prompt", "llama-adapter"] {
        let (code, message) =
            refused(&["merge", "--model", &model, "--adapter", &shop.path(method), "--out", &shop.path("merged")]);
        assert!(code == 1 && message.contains("no part of any weight"), "{message}");
    }
    unions_are_inspected_and_converted(&shop);
    // All layers, where none is named.
    let inspected = json_of(&["inspect", "--json", &shop.path("llama-adapter")]);
    assert_eq!((&inspected["known"], &inspected["tensors"]), (&json!(true), &json!(4)), "{inspected}");
    assert_eq!(inspected["config"]["adapter_layers"], json!(2), "{inspected}");
}

/// A union says what it is of, and is the same in the other layout.
fn unions_are_inspected_and_converted(shop: &Workshop) {
    let (model, mam, hub, back) = (shop.path("model"), shop.path("mam"), shop.path("hub"), shop.path("back"));
    json_of(&["convert", "--json", "--adapter", &mam, "--out", &hub, "--name", "en"]);
    json_of(&["convert", "--json", "--adapter", &hub, "--out", &back]);
    let expected = logits(&model, Some(&mam));
    for (dir, parts) in
        [(&mam, "PREFIX_TUNING, BOTTLENECK"), (&hub, "prefix_tuning, bottleneck"), (&back, "PREFIX_TUNING, BOTTLENECK")]
    {
        let text = String::from_utf8(peft(&["inspect", dir]).stdout).unwrap();
        assert!(text.contains("UNION") && text.contains(parts), "{text}");
        assert!(deviation(&logits(&model, Some(dir)), &expected) < 1e-5, "{dir}");
    }
    let tensors = peft_core::files::read_values(&Path::new(&hub).join("adapter.safetensors")).unwrap();
    // Where keys begin with the model's name, those of the prefix do too.
    assert!(tensors.contains_key("model.prefix_tuning.prefix_tunings.en.self_prefix.wte.weight"));
}

/// Without `--steps` of that number.
fn without(args: &[String], steps: &str) -> Vec<String> {
    let at = args.windows(2).position(|pair| pair[0] == "--steps" && pair[1] == steps).unwrap();
    [&args[..at], &args[at + 2..]].concat()
}

#[test]
fn settings_that_prompts_do_not_have_are_refused() {
    let shop = Workshop::new();
    let refusal = |method: &str, more: &[&str]| {
        let (code, message) = refused(&strs(&train(&shop, method, more)));
        assert_eq!(code, 2, "{message}");
        message
    };
    assert!(refusal("prompt", &["--targets", "q_proj"]).contains("--targets: prompt adapts no layers"));
    assert!(refusal("prompt", &["--rank", "4"]).contains("--rank: prompt has no such setting"));
    assert!(refusal("prefix", &["--encoder-hidden-size", "4"]).contains("--prefix-projection"));
    assert!(refusal("prompt", &["--prompt-text", ""]).contains("--prompt-text: there is no token"));
    assert!(refusal("prompt", &["--prompt-labels", "yes,no", "--prompt-text", "x"]).contains("more than one is given"));
    let labels = ["--num-virtual-tokens", "2", "--prompt-labels", "yes,no,maybe"];
    assert!(refusal("prompt", &labels).contains("3 labels, for 2 virtual tokens"));
    assert!(refusal("prefix", &["--prompt-labels", "yes"]).contains("--prompt-labels: prefix has no such setting"));
    assert!(refusal("prefix", &["--prefix-projection", "--prompt-text", "x"]).contains("cannot start from"));
    assert!(refusal("p-tuning", &["--init", "random"]).contains("--init random"));
    assert!(refusal("prompt", &["--num-virtual-tokens", "0"]).contains("num_virtual_tokens"));
    assert!(refusal("prompt", &["--num-virtual-tokens", "100000"]).contains("positions of the model"));
    assert!(refusal("prefix", &["--num-virtual-tokens", "100000"]).contains("positions of the model"));
    assert!(refusal("prompt", &["--num-virtual-tokens", "1000000000000"]).contains("num_virtual_tokens"));
    assert!(refusal("prompt", &["--pack"]).contains("--pack"));
    assert!(refusal("llama-adapter", &["--num-virtual-tokens", "0"]).contains("adapter_len"));
    assert!(refusal("llama-adapter", &["--adapter-layers", "30"]).contains("at most the 2 layers"));
    assert!(refusal("llama-adapter", &["--modules-to-save", "lm_head"]).contains("--modules-to-save lm_head"));
    assert!(refusal("llama-adapter", &["--targets", "q_proj"]).contains("adapts no layers"));
    assert!(refusal("prompt", &["--adapter-layers", "1"]).contains("--adapter-layers: prompt has no such setting"));
    assert!(refusal("lora", &["--prompt-text", "x"]).contains("--prompt-text: lora has no such setting"));
}

/// Two tasks with the same questions and other answers: one prompt cannot tell them apart, a prompt for each can.
#[test]
fn each_file_of_data_is_a_task() {
    let shop = Workshop::new();
    let (model, first) = (shop.path("model"), shop.path("data.jsonl"));
    let second = shop.path("second.jsonl");
    fs::write(&second, fs::read_to_string(&first).unwrap().replace("I am {{name}}.", "No {{name}}!")).unwrap();
    for (method, more) in [("multitask", &["--num-ranks", "2"][..]), ("prompt-bank", &[])] {
        let two = ["--data", &second, "--eval-data", &first, "--eval-data", &second, "--num-virtual-tokens", "8"];
        let result = json_of(&strs(&train(&shop, method, &[&two, more].concat())));
        let loss = |evaluation: &Value| evaluation["loss"].as_f64().unwrap();
        assert!(loss(&result["after"]) < 0.9 * loss(&result["before"]), "{method}: {result}");
        let out = shop.path(method);
        let adapted = ["--model", &model, "--adapter", &out];
        let measured = |data: &str, task: &str| {
            let own = ["--data", data, "--set", "name=Ada", "--task-id", task];
            loss(&json_of(&[&["eval", "--json"][..], &adapted, &own].concat()))
        };
        assert!(measured(&first, "0") < measured(&first, "1"), "{method}: the task of the first file");
        assert!(measured(&second, "1") < measured(&second, "0"), "{method}: the task of the second file");
        let text = |task: &str| {
            let own = ["--prompt", "3: who are you? ", "--max-new-tokens", "4", "--task-id", task];
            json_of(&[&["generate", "--json"][..], &adapted, &own].concat())["text"].clone()
        };
        assert_ne!(text("0"), text("1"), "{method}");
        let tokens = ["--tokens", "3,14"];
        let (code, message) = refused(&[&["logits"][..], &adapted, &tokens].concat());
        assert!(code == 2 && message.contains("--task-id is missing"), "{message}");
        let (code, message) = refused(&[&["logits"][..], &adapted, &tokens, &["--task-id", "2"]].concat());
        assert!(code == 2 && message.contains("there is no such task"), "{message}");
    }
    let (_, message) = refused(&strs(&train(&shop, "prompt", &["--data", &second, "--eval-data", &first])));
    assert!(message.contains("--eval-data: 1 files, where --data has 2"), "{message}");
}

/// A prompt in the places of a token, and a prefix in one block.
#[test]
fn prompts_have_their_places() {
    let shop = Workshop::new();
    let (model, data) = (shop.path("model"), shop.path("placed.jsonl"));
    fs::write(&data, fs::read_to_string(shop.path("data.jsonl")).unwrap().replace("who are", "~~ are ~~")).unwrap();
    let methods: [(&str, &[&str]); 2] = [
        ("p-tuning", &["--num-virtual-tokens", "4", "--placeholder", "~", "--encoder-hidden-size", "8"]),
        ("prefix", &["--num-virtual-tokens", "4", "--layers", "1"]),
    ];
    for (method, more) in methods {
        let mut args = train(&shop, method, more);
        let at = args.iter().position(|arg| *arg == shop.path("data.jsonl")).unwrap();
        args[at].clone_from(&data);
        let result = json_of(&strs(&args));
        let loss = |evaluation: &Value| evaluation["loss"].as_f64().unwrap();
        assert!(loss(&result["after"]) < 0.95 * loss(&result["before"]), "{method}: {result}");
        assert!(
            deviation(&logits(&model, Some(&shop.path(method))), &logits(&model, None)) > 1e-3 || method == "p-tuning"
        );
    }
    let config = fs::read_to_string(Path::new(&shop.path("p-tuning")).join("adapter_config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["placeholder_token_id"], json!(94));
    // Without a placeholder in the text the model is the base.
    assert_eq!(logits(&model, Some(&shop.path("p-tuning"))), logits(&model, None));
    let refusals: [(&str, &[&str], &str); 4] = [
        ("p-tuning", &["--placeholder", "ab"], "--placeholder ab: that is 2 tokens"),
        ("p-tuning", &["--input-conditioned"], "an encoder of type LSTM"),
        ("p-tuning", &["--input-conditioned", "--encoder", "lstm"], "reads texts whole"),
        ("prefix", &["--layers", "7"], "layers_to_transform"),
    ];
    for (method, more, expected) in refusals {
        let (code, message) = refused(&strs(&train(&shop, method, &[more, &["--overwrite"]].concat())));
        assert!(code == 2 && message.contains(expected), "{message}");
    }
}
