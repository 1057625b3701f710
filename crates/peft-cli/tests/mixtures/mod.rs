//! Mixtures and PILL on the command line.

use super::*;

/// Each is trained on two tasks, draws its load, is used by task where it tells them apart, and resumed.
#[test]
fn mixtures_are_trained_used_and_resumed() {
    let shop = Workshop::new();
    let (model, first, second) = (shop.path("model"), shop.path("data.jsonl"), shop.path("second.jsonl"));
    fs::write(&second, fs::read_to_string(&first).unwrap().replace("I am {{name}}.", "No {{name}}!")).unwrap();
    let methods: [(&str, &[&str]); 5] = [
        (
            "molora",
            &["--num-experts", "4", "--top-k", "2", "--balance", "0.01", "--rank", "2", "--shared-experts", "1"],
        ),
        ("loramoe", &["--num-experts", "4", "--rank", "2"]),
        ("mixlora", &["--num-experts", "4", "--rank", "2", "--targets", "q_proj,v_proj"]),
        ("moelora", &["--num-experts", "3"]),
        ("mov", &["--experts-per-layer", "3,2", "--top-p", "0.6", "--z-loss", "0.001", "--targets", "q_proj,v_proj"]),
    ];
    for (method, more) in methods {
        let own = ["--method", method, "--data", &second, "--steps", "20", "--eval-every", "10"];
        let mut args = shop.train(method, &[&own[..], more].concat());
        if more.contains(&"--targets") {
            let at = args.iter().position(|arg| arg == "all-linear").unwrap();
            args.drain(at - 1..=at);
        }
        let result = json_of(&strs(&args));
        let loss = |evaluation: &Value| evaluation["loss"].as_f64().unwrap();
        assert!(loss(&result["after"]) < 0.95 * loss(&result["before"]), "{method}: {result}");
        let out = shop.path(method);
        assert!(fs::read_to_string(format!("{out}/experts.svg")).unwrap().contains("percent of the rows"), "{method}");
        let metrics = fs::read_to_string(format!("{out}/metrics.jsonl")).unwrap();
        let experts: Value =
            serde_json::from_str(metrics.lines().rfind(|line| line.contains("\"experts\"")).unwrap()).unwrap();
        let load = experts["load"].as_object().unwrap().values().next().unwrap().as_array().unwrap();
        let sum: f64 = load.iter().map(|part| part.as_f64().unwrap()).sum();
        assert!((sum - 1.0).abs() < 1e-5, "{method}: {experts}");
        assert_eq!(experts["loss"].as_f64().unwrap() > 0.0, method != "moelora", "{experts}");
        let task: &[&str] = if method == "moelora" { &["--task-id", "1"] } else { &[] };
        let adapted = ["--model", &model, "--adapter", &out];
        let data = ["--data", &second, "--set", "name=Ada"];
        let evaluated = json_of(&[&["eval", "--json"][..], &adapted, &data, task].concat());
        assert!(loss(&evaluated) < loss(&result["before"]), "{method}: {evaluated}");
        let (code, message) = refused(&["merge", "--model", &model, "--adapter", &out, "--out", &shop.path("merged")]);
        assert!(code == 1 && message.contains("a router opens gates row by row"), "{message}");
    }
    a_task_is_a_lora(&shop);
    let refusals: [(&[&str], &str); 7] = [
        (&["--method", "molora", "--num-experts", "0"], "num_experts"),
        (&["--method", "molora", "--top-k", "2", "--top-p", "0.5"], "--top-k and --top-p are both given"),
        (&["--method", "molora", "--top-k", "11"], "top_k of at most 10"),
        (&["--method", "molora", "--experts-per-layer", "4"], "experts_per_layer"),
        (&["--method", "loramoe", "--pack"], "--pack"),
        (&["--method", "moelora", "--top-k", "2"], "--top-k: moelora has no such setting"),
        (&["--method", "moelora", "--pack"], "--pack"),
    ];
    for (more, expected) in refusals {
        let (code, message) = refused(&strs(&shop.train("refused", more)));
        assert!(code == 2 && message.contains(expected), "{message}");
    }
}

/// One task of several is a plain adapter, which gives the same and merges.
fn a_task_is_a_lora(shop: &Workshop) {
    let (model, all, one) = (shop.path("model"), shop.path("moelora"), shop.path("one"));
    json_of(&["convert", "--json", "--adapter", &all, "--task-id", "1", "--out", &one]);
    let used = |task: &str| -> Vec<f64> {
        let json =
            json_of(&["logits", "--model", &model, "--tokens", "3,14,15,92,65", "--adapter", &all, "--task-id", task]);
        json["logits"].as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect()
    };
    assert!(deviation(&logits(&model, Some(&one)), &used("1")) < 1e-4);
    assert!(deviation(&used("0"), &used("1")) > 1e-4);
    assert!(peft(&["merge", "--model", &model, "--adapter", &one, "--out", &shop.path("merged-one")]).status.success());
    let (code, message) =
        refused(&["convert", "--adapter", &shop.path("molora"), "--task-id", "0", "--out", &shop.path("none")]);
    assert!(code == 2 && message.contains("a router by task"), "{code}: {message}");
    let (code, message) =
        refused(&["convert", "--adapter", &shop.path("mov"), "--task-id", "0", "--out", &shop.path("none")]);
    assert!(code == 2 && message.contains("--task-id"), "{code}: {message}");
}

/// Skills are learned from two tasks, and used for one of them.
#[test]
fn skills_are_shared_by_tasks() {
    let shop = Workshop::new();
    let (model, first, second) = (shop.path("model"), shop.path("data.jsonl"), shop.path("second.jsonl"));
    fs::write(&second, fs::read_to_string(&first).unwrap().replace("I am {{name}}.", "No {{name}}!")).unwrap();
    let own = ["--method", "poly", "--data", &second, "--num-experts", "3", "--rank", "2", "--steps", "20"];
    let result = json_of(&strs(&shop.train("poly", &own)));
    let loss = |evaluation: &Value| evaluation["loss"].as_f64().unwrap();
    assert!(loss(&result["after"]) < 0.95 * loss(&result["before"]), "{result}");
    let out = shop.path("poly");
    let used = |task: &str| {
        json_of(&["logits", "--model", &model, "--adapter", &out, "--tokens", "3,4,5", "--task-id", task])["logits"]
            .clone()
    };
    assert_ne!(used("0"), used("1"));
    let (code, message) = refused(&["logits", "--model", &model, "--adapter", &out, "--tokens", "3", "--task-id", "2"]);
    assert!(code == 2 && message.contains("has 2"), "{message}");
    let (code, message) = refused(&["merge", "--model", &model, "--adapter", &out, "--out", &shop.path("merged")]);
    assert!(code == 1 && message.contains("each task mixes the skills"), "{message}");
    let (code, message) = refused(&strs(&shop.train("refused", &["--method", "poly", "--num-experts", "0"])));
    assert!(code == 2 && message.contains("n_skills"), "{message}");
}

/// What the program wrote is what was to be computed by PEFT's file of logits, of which the first row is read.
fn gives_the_logits_of_peft(adapter: &str, case: &str) {
    let bytes = fs::read(testdata(&format!("mixtures/{case}/logits.safetensors"))).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let (tokens, logits) = (file.tensor("tokens").unwrap(), file.tensor("logits").unwrap());
    let count = tokens.shape()[1];
    let ids = tokens.data().chunks(8).take(count).map(|id| i64::from_le_bytes(id.try_into().unwrap()).to_string());
    let ids = ids.collect::<Vec<_>>().join(",");
    let values = logits.data().chunks(4).map(|value| f64::from(f32::from_le_bytes(value.try_into().unwrap())));
    let expected: Vec<f64> = values.take(count * logits.shape()[2]).collect();
    let model = testdata("models/llama");
    let found = json_of(&["logits", "--model", &model, "--adapter", adapter, "--tokens", &ids]);
    let found: Vec<f64> = found["logits"].as_array().unwrap().iter().map(|value| value.as_f64().unwrap()).collect();
    assert!(deviation(&found, &expected) < 1e-4, "{case}");
}

#[test]
fn trained_adapters_are_mixed_without_training() {
    let dir = TempDir::new().unwrap();
    let (out, expert) =
        (dir.path().join("mixed").display().to_string(), |name| testdata(&format!("mixtures/experts/{name}")));
    let tasks = ["0", "1", "2"].map(expert);
    let adapters: Vec<&str> = tasks.iter().flat_map(|task| ["--adapter", task.as_str()]).collect();
    let combine = |more: &[&str]| {
        [&["combine", "--json", "--how", "arrow", "--out", &out, "--overwrite"][..], &adapters, more]
            .concat()
            .into_iter()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let report = json_of(&strs(&combine(&["--top-k", "2", "--temperature", "0.5"])));
    assert_eq!((&report["adapters"], &report["top_k"]), (&json!(3), &json!(2)));
    gives_the_logits_of_peft(&out, "arrow/plain");
    json_of(&strs(&combine(&[])));
    gives_the_logits_of_peft(&out, "arrow/all");
    let general = ["general_0", "general_1"].map(expert);
    json_of(&strs(&combine(&["--top-k", "2", "--general", &general[0], "--general", &general[1]])));
    gives_the_logits_of_peft(&out, "arrow/general");

    let weighted = format!("{}=0.5", tasks[0]);
    let refusals: [(&[&str], &str); 3] = [
        (&["--adapter", &weighted], "tokens choose the weights"),
        (&["--rank", "4"], "--how svd"),
        (&["--top-k", "4"], "from 1 to 3"),
    ];
    for (more, expected) in refusals {
        let (_, message) = refused(&strs(&combine(more)));
        assert!(message.contains(expected), "{message}");
    }
    let (_, message) = refused(&[
        "combine",
        "--adapter",
        &tasks[0],
        "--top-k",
        "1",
        "--out",
        &dir.path().join("x").display().to_string(),
    ]);
    assert!(message.contains("--how arrow"), "{message}");
    // The router of PEFT has no adapters in it.
    let (_, message) =
        refused(&["logits", "--model", "tiny", "--adapter", &testdata("mixtures/arrow/plain"), "--tokens", "1"]);
    assert!(message.contains("peft combine --how arrow"), "{message}");
}

#[test]
fn folders_of_xlora_are_used() {
    gives_the_logits_of_peft(&testdata("mixtures/xlora/layerwise"), "xlora/layerwise");
}

/// Two tasks are learned apart; then a classifier learns which of the two a token needs.
#[test]
fn a_classifier_of_trained_adapters_is_trained() {
    let shop = Workshop::new();
    let (model, first, second) = (shop.path("model"), shop.path("data.jsonl"), shop.path("second.jsonl"));
    fs::write(&second, fs::read_to_string(&first).unwrap().replace("I am {{name}}.", "No {{name}}!")).unwrap();
    let without = |mut args: Vec<String>, flag: &str| {
        let at = args.iter().position(|arg| arg == flag).unwrap();
        args.drain(at..at + 2);
        args
    };
    json_of(&strs(&shop.train("law", &["--rank", "2", "--steps", "20"])));
    let mut code = shop.train("code", &["--rank", "4", "--steps", "20"]);
    code.iter_mut().filter(|arg| **arg == first).for_each(|arg| arg.clone_from(&second));
    json_of(&strs(&code));
    let (law, code, out) = (shop.path("law"), shop.path("code"), shop.path("xlora"));
    let experts = ["--method", "xlora", "--experts", &law, "--experts", &code];
    let train = |name: &str, more: &[&str]| without(shop.train(name, &[&experts[..], more].concat()), "--targets");
    let own = ["--data", &second, "--steps", "30", "--top-k", "1", "--layerwise-scalings"];
    let result = json_of(&strs(&train("xlora", &own)));
    let loss = |evaluation: &Value| evaluation["loss"].as_f64().unwrap();
    assert!(loss(&result["after"]) < loss(&result["before"]), "{result}");
    // Two experts for each of 14 layers, from hidden states of 32.
    assert_eq!(result["parameters"]["trainable"], json!((32 + 1) * 2 * 14), "{result}");
    let picture = fs::read_to_string(format!("{out}/experts.svg")).unwrap();
    assert!(picture.contains("percent of the rows"), "{picture}");
    let metrics = fs::read_to_string(format!("{out}/metrics.jsonl")).unwrap();
    let said: Value =
        serde_json::from_str(metrics.lines().rfind(|line| line.contains("\"experts\"")).unwrap()).unwrap();
    let load = said["load"].as_object().unwrap();
    assert_eq!(load.len(), 14, "{said}");
    assert!(load.keys().any(|path| path.ends_with("layers.1.mlp.down_proj")), "{said}");
    let kept = |folder: &str, expert: &str| {
        let values = |path: String| fs::read(format!("{path}/adapter_model.safetensors")).unwrap();
        assert_eq!(values(format!("{out}/{folder}")), values(expert.to_owned()), "expert {folder} was changed");
    };
    kept("0", &law);
    kept("1", &code);
    let used = ["eval", "--json", "--model", &model, "--adapter", &out, "--data", &second, "--set", "name=Ada"];
    assert!(loss(&json_of(&used)) < loss(&result["before"]));
    let more = json_of(&["train", "--json", "--out", &out, "--resume", "--steps", "40"]);
    assert_eq!((&more["outcome"], &more["steps"]), (&json!("finished"), &json!(40)), "{more}");
    kept("1", &code);
    let (status, message) = refused(&["merge", "--model", &model, "--adapter", &out, "--out", &shop.path("merged")]);
    assert!(status == 1 && message.contains("a classifier says token by token"), "{message}");

    let none = without(shop.train("refused", &["--method", "xlora"]), "--targets");
    let refusals = [
        (none, "--experts is missing"),
        (train("refused", &["--experts", &model]), "adapter_config.json"),
        (train("refused", &["--top-k", "3"]), "--top-k 3: there are 2 --experts"),
        (train("refused", &["--modules-to-save", "lm_head"]), "its own classifier and nothing besides, here lm_head"),
        (shop.train("refused", &experts), "--targets"),
        (train("refused", &["--rank", "2"]), "--rank: xlora has no such setting"),
    ];
    for (args, expected) in refusals {
        let (_, message) = refused(&strs(&args));
        assert!(message.contains(expected), "{message}");
    }
}

/// On text: trained, used, refused where it does not fit.
#[test]
fn pill_is_trained_on_text() {
    let shop = Workshop::new();
    let (model, data, out) = (shop.path("model"), shop.path("data.jsonl"), shop.path("pill"));
    let without_targets = |name: &str, more: &[&str]| {
        let mut args = shop.train(name, more);
        let at = args.iter().position(|arg| arg == "all-linear").unwrap();
        args.drain(at - 1..=at);
        args
    };
    let args = without_targets("pill", &["--method", "pill", "--adapter-dim", "6", "--steps", "20"]);
    let result = json_of(&strs(&args));
    let loss = |evaluation: &Value| evaluation["loss"].as_f64().unwrap();
    assert!(loss(&result["after"]) < 0.95 * loss(&result["before"]), "{result}");
    let used = ["--model", &model, "--adapter", &out];
    let evaluated = json_of(&[&["eval", "--json"][..], &used, &["--data", &data, "--set", "name=Ada"]].concat());
    assert!(loss(&evaluated) < loss(&result["before"]), "{evaluated}");
    let (code, message) = refused(&["merge", "--model", &model, "--adapter", &out, "--out", &shop.path("merged")]);
    assert!(code == 1 && message.contains("hangs on its modality"), "{message}");
    for (more, expected) in [("--rank", "--rank: pill has no such setting"), ("--adapter-dim", "adapter_dim")] {
        let value = if more == "--rank" { "4" } else { "0" };
        let (code, message) = refused(&strs(&without_targets("refused", &["--method", "pill", more, value])));
        assert!(code == 2 && message.contains(expected), "{message}");
    }
}
