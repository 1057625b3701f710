//! Mixtures and PILL on the command line.

use super::*;

/// Each is trained on two tasks, draws its load, is used by task where it tells them apart, and resumed.
#[test]
fn mixtures_are_trained_used_and_resumed() {
    let shop = Workshop::new();
    let (model, first, second) = (shop.path("model"), shop.path("data.jsonl"), shop.path("second.jsonl"));
    fs::write(&second, fs::read_to_string(&first).unwrap().replace("I am {{name}}.", "No {{name}}!")).unwrap();
    let methods: [(&str, &[&str]); 4] = [
        ("molora", &["--num-experts", "4", "--top-k", "2", "--balance", "0.01", "--rank", "2"]),
        ("loramoe", &["--num-experts", "4", "--rank", "2"]),
        ("moelora", &["--num-experts", "3"]),
        ("mov", &["--num-experts", "3", "--targets", "q_proj,v_proj"]),
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
        assert_eq!(experts["loss"].as_f64().unwrap() > 0.0, ["molora", "loramoe"].contains(&method), "{experts}");
        let task: &[&str] = if method == "moelora" { &["--task-id", "1"] } else { &[] };
        let adapted = ["--model", &model, "--adapter", &out];
        let data = ["--data", &second, "--set", "name=Ada"];
        let evaluated = json_of(&[&["eval", "--json"][..], &adapted, &data, task].concat());
        assert!(loss(&evaluated) < loss(&result["before"]), "{method}: {evaluated}");
        let (code, message) = refused(&["merge", "--model", &model, "--adapter", &out, "--out", &shop.path("merged")]);
        assert!(code == 1 && message.contains("a router opens gates row by row"), "{message}");
    }
    let refusals: [(&[&str], &str); 3] = [
        (&["--method", "molora", "--num-experts", "0"], "num_experts"),
        (&["--method", "moelora", "--top-k", "2"], "--top-k: moelora has no such setting"),
        (&["--method", "moelora", "--pack"], "--pack"),
    ];
    for (more, expected) in refusals {
        let (code, message) = refused(&strs(&shop.train("refused", more)));
        assert!(code == 2 && message.contains(expected), "{message}");
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
