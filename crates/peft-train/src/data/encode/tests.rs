use serde_json::{Map, Value, json};

use super::*;

const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// One token a byte, except that `merges` join two characters; `<s>` before each text, `</s>` and `<|im_end|>` as ends.
fn tokenizer(chat_template: Option<&str>, merges: &[[&str; 2]]) -> Tokenizer {
    let mut vocab: Map<String, Value> = (0..256).map(|byte| (format!("<0x{byte:02X}>"), json!(byte))).collect();
    let mut add = |token: String| {
        let id = vocab.len();
        vocab.entry(token).or_insert(json!(id));
    };
    for pair in merges {
        pair.iter().for_each(|part| add((*part).to_owned()));
        add(pair.concat());
    }
    let special = [(0, "<s>"), (1, "</s>"), (2, "<|im_start|>"), (3, "<|im_end|>")].map(|(id, token)| {
        json!({"id": vocab.len() + id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true})
    });
    let model = json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": true, "vocab": vocab, "merges": merges});
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
        "added_tokens": special, "model": model,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [special[0]["id"]], "tokens": ["<s>"]}}
        },
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
    });
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, value: &Value| std::fs::write(dir.path().join(name), value.to_string()).unwrap();
    let end = special[3]["id"].clone();
    write("tokenizer.json", &json);
    write("tokenizer_config.json", &json!({"bos_token": "<s>", "eos_token": "</s>", "chat_template": chat_template}));
    write("generation_config.json", &json!({"eos_token_id": [end]}));
    Tokenizer::from_dir(dir.path()).unwrap()
}

fn text(sample: &Sample, tokenizer: &Tokenizer) -> String {
    tokenizer.decode(sample.ids(), false).unwrap()
}

/// The learnt tokens, with `|` between runs.
fn learnt(sample: &Sample, tokenizer: &Tokenizer) -> String {
    let runs = sample.mask().iter().zip(sample.ids()).collect::<Vec<_>>();
    let runs = runs.chunk_by(|a, b| a.0 == b.0).filter(|run| *run[0].0);
    let decode =
        |run: &[(&bool, &u32)]| tokenizer.decode(&run.iter().map(|pair| *pair.1).collect::<Vec<_>>(), false).unwrap();
    runs.map(decode).collect::<Vec<_>>().join("|")
}

fn one(row: Row, tokenizer: &Tokenizer, options: &EncodeOptions) -> Sample {
    let (mut samples, report) = encode(&[row], tokenizer, options).unwrap();
    assert_eq!((samples.len(), report.rows_skipped, report.rows_truncated), (1, 0, 0));
    assert_eq!(report.trained, samples[0].mask().iter().filter(|&&learnt| learnt).count());
    samples.remove(0)
}

fn conversation() -> Row {
    Row::Chat {
        messages: vec![
            Message::user("Hi é"),
            Message::assistant("Hello 漢!"),
            Message::user("So?"),
            Message::assistant("Bye "),
            Message::user("unanswered"),
        ],
    }
}

#[test]
fn only_what_the_assistant_says_is_learnt() {
    let options = EncodeOptions::default();
    let tokenizer_ = tokenizer(Some(CHATML), &[]);
    let sample = one(conversation(), &tokenizer_, &options);
    assert_eq!(learnt(&sample, &tokenizer_), "Hello 漢!<|im_end|>|Bye <|im_end|>");
    assert!(text(&sample, &tokenizer_).ends_with("Bye <|im_end|>"), "what follows the last answer is left out");

    let mistral = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content + eos_token + ' ' }}{% endif %}{% endfor %}";
    let tokenizer_ = tokenizer(Some(mistral), &[]);
    let sample = one(conversation(), &tokenizer_, &options);
    assert_eq!(learnt(&sample, &tokenizer_), "Hello 漢!</s>|Bye </s>");
    assert_eq!(text(&sample, &tokenizer_), "<s>[INST] Hi é [/INST]Hello 漢!</s> [INST] So? [/INST]Bye </s>");
}

#[test]
fn templates_that_do_not_nest_are_understood() {
    let options = EncodeOptions::default();
    // The generation prompt opens a block that finished answers lack.
    let reasoning = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>'");
    let tokenizer_ = tokenizer(Some(&reasoning), &[]);
    let sample = one(conversation(), &tokenizer_, &options);
    assert_eq!(learnt(&sample, &tokenizer_), "Hello 漢!<|im_end|>|Bye <|im_end|>");
    // The last user turn looks different from those before, and ends are written after the last turn only.
    let last = "{% for m in messages %}{% if loop.index0 == (messages | length) - 2 %}LAST {% endif %}{{ m.role }}: {{ m.content }}{{ eos_token if loop.last else '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}";
    let tokenizer_ = tokenizer(Some(last), &[]);
    let turns = ["q", "Yes.", "r", "No."].iter().enumerate();
    let turns = turns.map(|(i, said)| Message::new(["user", "assistant"][i % 2], *said)).collect();
    let sample = one(Row::Chat { messages: turns }, &tokenizer_, &options);
    assert_eq!(learnt(&sample, &tokenizer_), "Yes.|No.</s>");
    // Earlier answers lose their first word.
    let rewriting =
        "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last else m.content.split(' ')[-1] }}\n{% endfor %}";
    let error = encode(&[conversation()], &tokenizer(Some(rewriting), &[]), &options).unwrap_err().to_string();
    assert!(error.starts_with("row 1: the chat template rewrites what the assistant says in turn 2"), "{error}");
}

#[test]
fn a_template_that_refuses_names_the_row() {
    let tokenizer = tokenizer(Some("{{ raise_exception('no system please') }}"), &[]);
    let rows = [Row::Text { text: "fine".into() }, Row::Chat { messages: vec![Message::system("s")] }];
    let error = encode(&rows, &tokenizer, &EncodeOptions::default()).unwrap_err().to_string();
    assert!(error.starts_with("row 2: chat template:") && error.contains("no system please"), "{error}");
}

#[test]
fn instructions_use_the_chat_template_or_the_alpaca_format() {
    let row = |input: &str| Row::Instruction { instruction: "Add.".into(), input: input.into(), output: "3".into() };
    let options = EncodeOptions::default();
    let chat = tokenizer(Some(CHATML), &[]);
    let sample = one(row("1 + 2"), &chat, &options);
    assert_eq!(text(&sample, &chat), "<|im_start|>user\nAdd.\n1 + 2<|im_end|>\n<|im_start|>assistant\n3<|im_end|>");
    assert_eq!(learnt(&sample, &chat), "3<|im_end|>");
    let plain = tokenizer(None, &[]);
    let sample = one(row(""), &plain, &options);
    assert!(text(&sample, &plain).starts_with("<s>Below is an instruction that describes a task. Write"));
    assert!(text(&sample, &plain).ends_with("request.\n\n### Instruction:\nAdd.\n\n### Response:\n3</s>"));
    assert_eq!(learnt(&sample, &plain), "3</s>");
    assert!(text(&one(row("1"), &plain, &options), &plain).contains("context. Write a response that appropriately"));
}

#[test]
fn completions_and_texts_end_once() {
    let tokenizer = tokenizer(None, &[]);
    let options = EncodeOptions::default();
    let row = |completion: &str| Row::Completion { prompt: "2+2=".into(), completion: completion.into() };
    assert_eq!(learnt(&one(row("4"), &tokenizer, &options), &tokenizer), "4</s>");
    assert_eq!(learnt(&one(row("4</s>"), &tokenizer, &options), &tokenizer), "4</s>");
    assert_eq!(learnt(&one(row("4\n"), &tokenizer, &options), &tokenizer), "4\n</s>");
    let bare = EncodeOptions { add_eos: false, ..options.clone() };
    assert_eq!(learnt(&one(row("4"), &tokenizer, &bare), &tokenizer), "4");
    let all = EncodeOptions { train_on_prompt: true, ..options };
    assert_eq!(learnt(&one(row("4"), &tokenizer, &all), &tokenizer), "2+2=4</s>");
}

#[test]
fn long_texts_are_split_without_loss() {
    let tokenizer = tokenizer(None, &[]);
    for length in 1..60 {
        for max_len in 2..9 {
            let source: String = (0..length).map(|i| char::from(b'a' + (i % 26) as u8)).collect();
            let options = EncodeOptions { max_len, ..EncodeOptions::default() };
            let (samples, report) = encode(&[Row::Text { text: source.clone() }], &tokenizer, &options).unwrap();
            let targets: Vec<u32> = samples.iter().flat_map(|sample| sample.ids()[1..].to_vec()).collect();
            assert_eq!(tokenizer.decode(&targets, false).unwrap(), source + "</s>");
            assert_eq!((report.trained, report.tokens_dropped), (length + 1, 0));
            assert_eq!(report.rows_split, usize::from(length + 2 > max_len));
            assert!(samples.iter().all(|sample| (2..=max_len).contains(&sample.ids().len())));
        }
    }
}

#[test]
fn what_is_cut_or_skipped_is_reported() {
    let tokenizer = tokenizer(None, &[]);
    let row = |prompt: &str, completion: &str| Row::Completion { prompt: prompt.into(), completion: completion.into() };
    let rows =
        [row("ab", "cd"), row("ab", "cdefgh"), row("abcdefgh", "i"), Row::Chat { messages: vec![Message::user("?")] }];
    let options = EncodeOptions { max_len: 6, ..EncodeOptions::default() };
    let (samples, report) = encode(&rows, &tokenizer, &options).unwrap();
    assert_eq!(samples.iter().map(|sample| learnt(sample, &tokenizer)).collect::<Vec<_>>(), ["cd</s>", "cde"]);
    let expected = EncodeReport {
        rows: 4,
        samples: 2,
        tokens: 12,
        trained: 6,
        rows_truncated: 2,
        tokens_dropped: 4 + 5,
        rows_skipped: 2,
        ..EncodeReport::default()
    };
    assert_eq!(report, expected);
    assert_eq!(
        report.to_string(),
        "4 rows: 2 samples, 12 tokens, 6 of them learnt; 2 rows cut at max_len; 9 tokens lost by that; 2 rows skipped, nothing to learn"
    );
}

#[test]
fn a_token_across_the_answers_start_is_learnt_and_reported() {
    let tokenizer = tokenizer(None, &[[" ", "h"]]);
    let row = Row::Completion { prompt: "say: ".into(), completion: "hi".into() };
    let (samples, report) = encode(&[row], &tokenizer, &EncodeOptions::default()).unwrap();
    assert_eq!(learnt(&samples[0], &tokenizer), " hi</s>");
    assert_eq!(report.answers_merged, 1);
}

#[test]
fn settings_that_cannot_work_are_refused() {
    let row = [Row::Text { text: "a".into() }];
    let error = encode(&row, &tokenizer(None, &[]), &EncodeOptions { max_len: 1, ..EncodeOptions::default() });
    assert!(error.unwrap_err().to_string().contains("max_len: is 1"));
    assert!(Sample::new(vec![1, 2], vec![true, false]).is_err());
    assert!(Sample::new(vec![1, 2], vec![true]).is_err());
}
