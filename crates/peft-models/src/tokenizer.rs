//! Text to token ids and back, with the special tokens and the chat template that belong to a model.

mod pairs;
mod wordpiece;

use std::fs;
use std::ops::Range;
use std::path::Path;

use serde_json::{Map, Value, json};

pub use self::pairs::{Encoded, Pairs};
use crate::chat::{ChatTemplate, Message};
use crate::{Error, Result};

/// Ids that mean something other than text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Begins a text.
    pub bos: Option<u32>,
    /// Each ends a text or a turn. The first is the one to append in training; generation stops at any.
    pub eos: Vec<u32>,
    /// Fills a batch.
    pub pad: Option<u32>,
}

/// A tokenizer in the Hugging Face format, the special tokens and the chat template.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    special: SpecialTokens,
    chat_template: Option<ChatTemplate>,
    /// What `tokenizer_config.json` held or will hold, so that saving loses nothing.
    config: Map<String, Value>,
}

/// A tokenizer in one file, or the vocabulary of BERT's, which is all that its first checkpoints have.
const FILE_NAMES: [&str; 2] = ["tokenizer.json", "vocab.txt"];

impl Tokenizer {
    /// The tokenizer of a model folder, if there is one: [`from_dir`](Self::from_dir).
    ///
    /// # Errors
    /// When there is one that cannot be read.
    pub fn find(dir: &Path) -> Result<Option<Self>> {
        let present = FILE_NAMES.iter().any(|name| dir.join(name).is_file());
        present.then(|| Self::from_dir(dir)).transpose()
    }

    /// Reads the tokenizer of a model folder: `tokenizer.json`, or BERT's `vocab.txt`; and, where present, `tokenizer_config.json`,
    /// `chat_template.jinja`, `generation_config.json` and `config.json`, an earlier one before a later one.
    ///
    /// # Errors
    /// When there is no tokenizer, a file is malformed, a special token is not in the vocabulary or the chat
    /// template does not compile.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let [path, vocabulary] = FILE_NAMES.map(|name| dir.join(name));
        let config_path = dir.join("tokenizer_config.json");
        let mut config = read_object(&config_path)?;
        let inner = if path.is_file() {
            let bytes = fs::read(&path).map_err(Error::io(&path))?;
            tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| Error::format(&path, e.to_string()))?
        } else if vocabulary.is_file() {
            wordpiece::from_vocabulary(&vocabulary, &mut config)?
        } else {
            return Err(Error::format(
                &path,
                "there is no such file; save the tokenizer there in the fast format (in Python: \
                 AutoTokenizer.from_pretrained(model).save_pretrained(folder))",
            ));
        };
        let template_path = dir.join("chat_template.jinja");
        if template_path.is_file() {
            let template = fs::read_to_string(&template_path).map_err(Error::io(&template_path))?;
            config.insert("chat_template".into(), template.into());
        }
        let chat_template = template_of(&config, &config_path)?;

        let mut special = SpecialTokens {
            bos: token_of(&config, "bos_token", &inner, &config_path)?,
            eos: token_of(&config, "eos_token", &inner, &config_path)?.into_iter().collect(),
            pad: token_of(&config, "pad_token", &inner, &config_path)?,
        };
        for file in ["generation_config.json", "config.json"] {
            // These name ids of the model, which may have more rows than the tokenizer has tokens.
            let model = read_object(&dir.join(file))?;
            let ids = |key: &str| ids_of(model.get(key)).into_iter().filter(|&id| inner.id_to_token(id).is_some());
            if !config.contains_key("bos_token") {
                // An explicit null there means that texts have no beginning token, whatever the model declares.
                special.bos = special.bos.or(ids("bos_token_id").next());
            }
            special.pad = special.pad.or(ids("pad_token_id").next());
            for id in ids("eos_token_id") {
                if !special.eos.contains(&id) {
                    special.eos.push(id);
                }
            }
        }
        Self::assemble(inner, special, chat_template, config)
    }

    /// Puts a tokenizer together from its parts, as the reader of another file format finds them.
    ///
    /// # Errors
    /// When a special token is not in the vocabulary or the chat template does not compile.
    pub fn new(inner: tokenizers::Tokenizer, special: SpecialTokens, chat_template: Option<String>) -> Result<Self> {
        let config = Map::from_iter([("tokenizer_class".to_owned(), json!("PreTrainedTokenizerFast"))]);
        Self::assemble(inner, special, chat_template, config)
    }

    fn assemble(
        mut inner: tokenizers::Tokenizer,
        special: SpecialTokens,
        chat_template: Option<String>,
        mut config: Map<String, Value>,
    ) -> Result<Self> {
        // A file may ask for cutting or padding each text; both would change training data behind the caller's back.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| tokenizer_error(&e))?;

        let named =
            [("bos_token", special.bos), ("eos_token", special.eos.first().copied()), ("pad_token", special.pad)];
        for (key, id) in named {
            let Some(id) = id else { continue };
            let token = inner.id_to_token(id).ok_or_else(|| {
                Error::Tokenizer(format!(
                    "{key} has id {id}, but the vocabulary ends at {}; correct the id where the model declares it",
                    inner.get_vocab_size(true)
                ))
            })?;
            if config.get(key).is_none_or(Value::is_null) {
                config.insert(key.to_owned(), token.into());
            }
        }
        if let Some(template) = &chat_template
            && !config.get("chat_template").is_some_and(Value::is_array)
        {
            config.insert("chat_template".into(), template.as_str().into());
        }
        let chat_template = chat_template.map(ChatTemplate::new).transpose()?;
        Ok(Self { inner, special, chat_template, config })
    }

    /// Bos, eos and pad.
    pub fn special(&self) -> &SpecialTokens {
        &self.special
    }

    /// The model's own chat template, if it has one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// Number of tokens, added ones included. A model's embedding may have more rows, never fewer.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// What fills a batch: pad, else the first eos, else 0. Its value never matters, since it is masked.
    pub fn pad_id(&self) -> u32 {
        self.special.pad.or(self.special.eos.first().copied()).unwrap_or(0)
    }

    /// The text of one token as the vocabulary spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token as the vocabulary spells it.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The ids of a text. With `add_special`, also those that the tokenizer puts around each text (often bos).
    ///
    /// # Errors
    /// When the tokenizer refuses the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        Ok(self.inner.encode_fast(text, add_special).map_err(|e| tokenizer_error(&e))?.get_ids().to_vec())
    }

    /// Like [`encode`](Self::encode), with the byte range of `text` behind each id; added special tokens have `0..0`.
    ///
    /// # Errors
    /// When the tokenizer refuses the text.
    pub fn encode_with_offsets(&self, text: &str, add_special: bool) -> Result<(Vec<u32>, Vec<Range<usize>>)> {
        let encoding = self.inner.encode(text, add_special).map_err(|e| tokenizer_error(&e))?;
        let ranges = encoding.get_offsets().iter().map(|&(start, end)| start..end).collect();
        Ok((encoding.get_ids().to_vec(), ranges))
    }

    /// The text of ids. Bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.inner.decode(ids, skip_special).map_err(|e| tokenizer_error(&e))
    }

    /// A decoder for ids that arrive one by one.
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream { tokenizer: self, skip_special, ids: Vec::new(), read: 0 }
    }

    /// The conversation as the model expects it, by its own chat template or else by `ChatML`. The special tokens are in
    /// the string: encode it with `add_special = false`.
    ///
    /// # Errors
    /// When the template refuses the messages.
    pub fn render_chat(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let text = |id: Option<u32>| id.and_then(|id| self.token(id));
        let (bos, eos) = (text(self.special.bos), text(self.special.eos.first().copied()));
        let render =
            |template: &ChatTemplate| template.render(messages, add_generation_prompt, bos.as_deref(), eos.as_deref());
        self.chat_template.as_ref().map_or_else(|| render(&ChatTemplate::chatml()?), render)
    }

    /// Writes `tokenizer.json` and `tokenizer_config.json`, from which `transformers` and [`from_dir`](Self::from_dir)
    /// read the same tokenizer. Further eos ids belong into the model's `generation_config.json`.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let write = |name: &str, text: String| {
            let path = dir.join(name);
            fs::write(&path, text).map_err(Error::io(&path))
        };
        fs::create_dir_all(dir).map_err(Error::io(dir))?;
        write("tokenizer.json", self.inner.to_string(false).map_err(|e| tokenizer_error(&e))?)?;
        write("tokenizer_config.json", format!("{:#}\n", Value::Object(self.config.clone())))
    }
}

/// Decodes ids as they are generated and never cuts a character in two.
#[derive(Clone, Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    /// Ids already returned that the next piece needs for context, then those held back.
    ids: Vec<u32>,
    /// How many of `ids` have been returned.
    read: usize,
}

impl DecodeStream<'_> {
    /// The text that this id completes; empty while a character is incomplete.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let piece = self.pending()?;
        if piece.is_empty() || piece.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        self.ids.drain(..self.read);
        self.read = self.ids.len();
        Ok(piece)
    }

    /// The text still held back, with U+FFFD where the last character never got complete.
    ///
    /// # Errors
    /// When the tokenizer's decoder fails.
    pub fn finish(self) -> Result<String> {
        self.pending()
    }

    /// What the ids held back add to those before them: a decoder may strip or join at the start of a text, so a piece
    /// is the difference of two decodings.
    fn pending(&self) -> Result<String> {
        let before = self.tokenizer.decode(&self.ids[..self.read], self.skip_special)?;
        let mut text = self.tokenizer.decode(&self.ids, self.skip_special)?;
        let common = text.bytes().zip(before.bytes()).take_while(|(a, b)| a == b).count();
        Ok(text.split_off(text.floor_char_boundary(common)))
    }
}

fn tokenizer_error(error: &tokenizers::Error) -> Error {
    Error::Tokenizer(error.to_string())
}

/// The object in a JSON file; empty if there is no such file.
fn read_object(path: &Path) -> Result<Map<String, Value>> {
    if !path.is_file() {
        return Ok(Map::new());
    }
    let bytes = fs::read(path).map_err(Error::io(path))?;
    serde_json::from_slice(&bytes).map_err(|e| Error::format(path, format!("not a JSON object: {e}")))
}

/// The id of a special token that is declared by its text, as a string or as `{"content": …}`.
fn token_of(config: &Map<String, Value>, key: &str, inner: &tokenizers::Tokenizer, path: &Path) -> Result<Option<u32>> {
    let token = match config.get(key) {
        None | Some(Value::Null) => return Ok(None),
        Some(value) => value.as_str().or_else(|| value.get("content")?.as_str()),
    };
    let token = token.ok_or_else(|| Error::format(path, format!("{key}: expected a string or {{\"content\": …}}")))?;
    inner.token_to_id(token).map(Some).ok_or_else(|| {
        Error::format(path, format!("{key} is {token:?}, which tokenizer.json lacks; add it there or remove the line"))
    })
}

/// The ids in an `…_token_id` entry: a number or a list of numbers.
fn ids_of(value: Option<&Value>) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(values)) => values.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// The chat template: a string, or the one called `default` in a list of `{"name", "template"}`.
fn template_of(config: &Map<String, Value>, path: &Path) -> Result<Option<String>> {
    let template = match config.get("chat_template") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Array(named)) => named.iter().find(|t| t["name"] == "default").and_then(|t| t["template"].as_str()),
        Some(value) => value.as_str(),
    };
    template.map(|template| Some(template.to_owned())).ok_or_else(|| {
        Error::format(path, "chat_template: expected a string or a list of {name, template} with one named \"default\"")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// GPT-2's spelling of the 256 bytes: printable ones stand for themselves, the others are shifted up.
    fn byte_alphabet() -> Vec<char> {
        let plain = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || b >= 174;
        let code = |b: u32| if plain(b) { b } else { 256 + (0..b).filter(|&b| !plain(b)).count() as u32 };
        (0..256).map(|b| char::from_u32(code(b)).unwrap()).collect()
    }

    /// A byte-level tokenizer: id of a byte is the byte; 256 is `<s>`, put before each text, 257 `</s>`, 258 `<pad>`.
    fn byte_level() -> Value {
        let vocab: Map<String, Value> =
            byte_alphabet().into_iter().enumerate().map(|(id, c)| (c.to_string(), id.into())).collect();
        let added = [(256, "<s>"), (257, "</s>"), (258, "<pad>")].map(|(id, token)| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true})
        });
        json!({
            "version": "1.0",
            "truncation": {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
            "padding": null,
            "added_tokens": added,
            "normalizer": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}}
            },
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}
        })
    }

    fn folder(files: &[(&str, Value)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, value) in files {
            fs::write(dir.path().join(name), value.to_string()).unwrap();
        }
        dir
    }

    #[test]
    fn reads_the_special_tokens_from_all_files() {
        let dir = folder(&[
            ("tokenizer.json", byte_level()),
            ("tokenizer_config.json", json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": null})),
            ("generation_config.json", json!({"eos_token_id": [258, 257, 70_000], "pad_token_id": 0})),
            ("config.json", json!({"eos_token_id": 10, "bos_token_id": 3})),
        ]);
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        assert_eq!(*tokenizer.special(), SpecialTokens { bos: Some(256), eos: vec![257, 258, 10], pad: Some(0) });
        assert_eq!(tokenizer.vocab_size(), 259);
        // Not cut to 4 tokens, though the file asks for it.
        assert_eq!(tokenizer.encode("hello</s>", true).unwrap(), [256, 104, 101, 108, 108, 111, 257]);
        assert_eq!(tokenizer.encode("é", false).unwrap(), [0xc3, 0xa9]);
        assert_eq!(tokenizer.encode_with_offsets("é", true).unwrap().1, [0..0, 0..2, 0..2]);
        assert_eq!(tokenizer.decode(&[256, 104, 0xc3, 0xa9, 257], true).unwrap(), "hé");
    }

    #[test]
    fn a_stream_never_cuts_a_character() {
        let dir = folder(&[("tokenizer.json", byte_level())]);
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        let text = "a é 漢字 🦀 end";
        let mut stream = tokenizer.decode_stream(true);
        let mut pieces = Vec::new();
        for id in tokenizer.encode(text, true).unwrap() {
            let piece = stream.push(id).unwrap();
            assert!(!piece.contains(char::REPLACEMENT_CHARACTER), "{piece:?}");
            pieces.push(piece);
        }
        assert_eq!(pieces.concat(), text);
        assert!(pieces.iter().all(|piece| piece.chars().count() <= 1), "nothing is held back longer than needed");
        assert_eq!(stream.push(0xf0).unwrap(), "");
        assert_eq!(stream.finish().unwrap(), "\u{fffd}");
    }

    #[test]
    fn saving_keeps_everything() {
        let template = "{{ bos_token }}{{ messages[0].content }}";
        let dir = folder(&[
            ("tokenizer.json", byte_level()),
            (
                "tokenizer_config.json",
                json!({"model_max_length": 99, "eos_token": "</s>", "chat_template": [
                    {"name": "tool_use", "template": "other"}, {"name": "default", "template": "old"}
                ]}),
            ),
            ("config.json", json!({"bos_token_id": 256})),
        ]);
        fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
        let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
        let saved = dir.path().join("saved");
        tokenizer.save(&saved).unwrap();
        let again = Tokenizer::from_dir(&saved).unwrap();
        assert_eq!(again.special(), tokenizer.special());
        assert_eq!(again.config["model_max_length"], 99);
        assert_eq!(again.chat_template().unwrap().source(), template);
        assert_eq!(again.render_chat(&[Message::user("hi")], true).unwrap(), "<s>hi");
    }

    #[test]
    fn parts_make_a_tokenizer_and_chatml_is_the_default() {
        let inner: tokenizers::Tokenizer = byte_level().to_string().parse().unwrap();
        let special = SpecialTokens { bos: None, eos: vec![257], pad: None };
        let tokenizer = Tokenizer::new(inner.clone(), special, None).unwrap();
        assert_eq!(tokenizer.pad_id(), 257);
        assert_eq!(tokenizer.render_chat(&[Message::user("hi")], false).unwrap(), "<|im_start|>user\nhi<|im_end|>\n");
        let special = SpecialTokens { bos: Some(300), ..SpecialTokens::default() };
        let error = Tokenizer::new(inner, special, None).unwrap_err().to_string();
        assert!(error.contains("bos_token has id 300"), "{error}");
    }

    #[test]
    fn errors_say_what_to_do() {
        let error = |files: &[(&str, Value)]| Tokenizer::from_dir(folder(files).path()).unwrap_err().to_string();
        let missing = error(&[]);
        assert!(missing.contains("tokenizer.json") && missing.contains("save_pretrained"), "{missing}");
        let unknown =
            error(&[("tokenizer.json", byte_level()), ("tokenizer_config.json", json!({"pad_token": "[PAD]"}))]);
        assert!(unknown.contains("pad_token is \"[PAD]\""), "{unknown}");
        let malformed = error(&[("tokenizer.json", byte_level()), ("generation_config.json", json!([1]))]);
        assert!(malformed.contains("generation_config.json: not a JSON object"), "{malformed}");
        let broken = error(&[("tokenizer.json", json!({"model": 3}))]);
        assert!(broken.contains("tokenizer.json"), "{broken}");
    }
}
