//! BERT's tokenizer from nothing but its vocabulary, as its first checkpoints have it.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::processors::bert::BertProcessing;
use tokenizers::{AddedToken, Tokenizer, decoders};

use crate::{Error, Result};

/// The special tokens: names in `tokenizer_config.json`, and what they are without one.
const SPECIAL: [(&str, &str); 5] = [
    ("pad_token", "[PAD]"),
    ("unk_token", "[UNK]"),
    ("cls_token", "[CLS]"),
    ("sep_token", "[SEP]"),
    ("mask_token", "[MASK]"),
];

/// The tokenizer of a `vocab.txt`: a token a line. `config` is `tokenizer_config.json`, of which case and accents are taken; what it leaves out is put in.
pub(super) fn from_vocabulary(path: &Path, config: &mut Map<String, Value>) -> Result<Tokenizer> {
    let malformed = |e: tokenizers::Error| Error::format(path, e.to_string());
    for (key, usual) in SPECIAL {
        config.entry(key).or_insert_with(|| usual.into());
    }
    let token = |key: &str| {
        let value = &config[key];
        let text = value.as_str().or_else(|| value.get("content")?.as_str());
        text.map(str::to_owned).ok_or_else(|| Error::format(path, format!("{key}: expected a string, found {value}")))
    };
    let flag = |key: &str| config.get(key).and_then(Value::as_bool);
    let vocabulary = WordPiece::read_bytes(&fs::read(path).map_err(Error::io(path))?).map_err(malformed)?;
    let model = WordPiece::builder().vocab(vocabulary).unk_token(token("unk_token")?).build().map_err(malformed)?;
    let mut tokenizer = Tokenizer::new(model);
    let id = |token: String, tokenizer: &Tokenizer| {
        let id = tokenizer.token_to_id(&token);
        id.map(|id| (token.clone(), id)).ok_or_else(|| Error::format(path, format!("{token} is not in it")))
    };
    let (separator, first) = (id(token("sep_token")?, &tokenizer)?, id(token("cls_token")?, &tokenizer)?);
    let chinese = flag("tokenize_chinese_chars").unwrap_or(true);
    let lowercase = flag("do_lower_case").unwrap_or(true);
    let normalizer = BertNormalizer::new(true, chinese, flag("strip_accents"), lowercase);
    tokenizer
        .with_normalizer(Some(normalizer))
        .with_pre_tokenizer(Some(BertPreTokenizer))
        .with_post_processor(Some(BertProcessing::new(separator, first)))
        .with_decoder(Some(decoders::wordpiece::WordPiece::default()));
    let special = SPECIAL.iter().map(|(key, _)| token(key)).collect::<Result<Vec<_>>>()?.into_iter();
    // One that is not in the vocabulary would get an id for which the model has no row.
    let special = special.filter(|token| tokenizer.token_to_id(token).is_some());
    let special: Vec<AddedToken> = special.map(|token| AddedToken::from(token, true)).collect();
    tokenizer.add_special_tokens(&special);
    Ok(tokenizer)
}
