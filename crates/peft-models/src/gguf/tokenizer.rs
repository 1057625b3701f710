//! The tokenizer inside a GGUF file.
//!
//! `tokenizer.ggml.model` names its kind. `gpt2` is byte-level BPE, given by tokens and merges; how text is split
//! before the merges is not in the file but implied by a name, `tokenizer.ggml.pre`. `llama` is `SentencePiece` BPE,
//! given by tokens and scores, from which the merges follow: every way to cut a token into two others, the best scored
//! token first.

use std::cmp::Reverse;

use serde_json::json;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::{self, NFC, Prepend, Replace};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer, decoders};

use super::metadata::Metadata;
use crate::{Error, Result};

/// What `SentencePiece` writes for a space.
const SPACE: &str = "\u{2581}";
/// The longest token in bytes; `SentencePiece`'s own limit is 16 characters unless its trainer is told otherwise.
const MAX_PIECE: usize = 1024;

/// Values of `tokenizer.ggml.token_type`.
mod token_type {
    pub(super) const NORMAL: i32 = 1;
    pub(super) const UNKNOWN: i32 = 2;
    pub(super) const CONTROL: i32 = 3;
    pub(super) const USER_DEFINED: i32 = 4;
}

/// Ids of the tokens that have a role, and whether they are added to a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpecialTokens {
    /// Beginning of a sequence.
    pub bos: Option<u32>,
    /// End of a sequence.
    pub eos: Option<u32>,
    /// Padding.
    pub pad: Option<u32>,
    /// What stands for text that no token covers.
    pub unk: Option<u32>,
    /// Whether a text begins with `bos`.
    pub add_bos: bool,
    /// Whether a text ends with `eos`.
    pub add_eos: bool,
}

impl SpecialTokens {
    pub(super) fn of(metadata: &Metadata) -> Result<Self> {
        let count = metadata.strings("tokenizer.ggml.tokens")?.map_or(0, <[String]>::len);
        let id = |role| {
            let key = format!("tokenizer.ggml.{role}_token_id");
            let Some(id) = metadata.uint(&key)? else { return Ok(None) };
            match u32::try_from(id) {
                // What llama.cpp writes for "none".
                Ok(u32::MAX) => Ok(None),
                Ok(small) if id < count as u64 => Ok(Some(small)),
                _ => Err(Error::format(metadata.path(), format!("`{key}` is {id}, but there are {count} tokens"))),
            }
        };
        // Files that do not say so follow the habit of their kind.
        let adds_bos = match metadata.string("tokenizer.ggml.model")? {
            Some("llama") => true,
            _ => matches!(metadata.string("tokenizer.ggml.pre")?, Some("llama-bpe" | "llama-v3" | "llama3")),
        };
        Ok(Self {
            bos: id("bos")?,
            eos: id("eos")?,
            pad: id("padding")?,
            unk: id("unknown")?,
            add_bos: metadata.boolean("tokenizer.ggml.add_bos_token")?.unwrap_or(adds_bos),
            add_eos: metadata.boolean("tokenizer.ggml.add_eos_token")?.unwrap_or(false),
        })
    }
}

/// The tokenizer that the metadata describes.
pub(super) fn tokenizer(metadata: &Metadata) -> Result<Tokenizer> {
    let model = metadata.required("tokenizer.ggml.model", metadata.string("tokenizer.ggml.model")?)?;
    let tokens = metadata.required("tokenizer.ggml.tokens", metadata.strings("tokenizer.ggml.tokens")?)?;
    let special = SpecialTokens::of(metadata)?;
    let kinds = token_kinds(metadata, tokens, special)?;
    let mut tokenizer = match model {
        "gpt2" => byte_level(metadata, tokens)?,
        "llama" => sentence_piece(metadata, tokens, &kinds, special)?,
        _ => {
            let hint = "use a GGUF file whose tokenizer model is `gpt2` or `llama`, or a Hugging Face directory".into();
            let what = format!("the tokenizer model `{model}` in {}", metadata.path().display());
            return Err(Error::Unsupported { what, hint });
        }
    };
    let added = tokens.iter().zip(kinds).filter_map(|(token, kind)| match kind {
        token_type::UNKNOWN | token_type::CONTROL => Some(AddedToken::from(token, true).normalized(false)),
        token_type::USER_DEFINED => Some(AddedToken::from(token, false).normalized(false)),
        _ => None,
    });
    tokenizer.add_tokens(&added.collect::<Vec<_>>());
    tokenizer.with_post_processor(template(metadata, tokens, special)?);
    Ok(tokenizer)
}

/// The type of every token; where the file has none, a token with a role is a control token.
fn token_kinds(metadata: &Metadata, tokens: &[String], special: SpecialTokens) -> Result<Vec<i32>> {
    let key = "tokenizer.ggml.token_type";
    if let Some(kinds) = metadata.ints(key)? {
        same_length(metadata, key, kinds.len(), tokens.len())?;
        return Ok(kinds.to_vec());
    }
    let mut kinds = vec![token_type::NORMAL; tokens.len()];
    for id in [special.bos, special.eos, special.pad, special.unk].into_iter().flatten() {
        // `SpecialTokens` holds ids of tokens only.
        kinds[id as usize] = token_type::CONTROL;
    }
    Ok(kinds)
}

fn same_length(metadata: &Metadata, key: &str, found: usize, tokens: usize) -> Result<()> {
    if found == tokens {
        return Ok(());
    }
    Err(Error::format(metadata.path(), format!("`{key}` has {found} entries for {tokens} tokens")))
}

/// Byte-level BPE.
fn byte_level(metadata: &Metadata, tokens: &[String]) -> Result<Tokenizer> {
    let key = "tokenizer.ggml.merges";
    let merges = read_merges(metadata, metadata.required(key, metadata.strings(key)?)?)?;
    let splitting = Splitting::of(metadata)?;
    let model = BPE::builder().vocab_and_merges(vocabulary(tokens), merges).ignore_merges(splitting.ignore_merges);
    let mut tokenizer = Tokenizer::new(model.build().map_err(invalid(metadata))?);
    if splitting.nfc {
        tokenizer.with_normalizer(Some(NFC));
    }
    tokenizer.with_pre_tokenizer(Some(splitting.pre_tokenizer().map_err(invalid(metadata))?));
    tokenizer.with_decoder(Some(ByteLevel::default()));
    Ok(tokenizer)
}

/// How text is cut before byte-level merges, which never cross a cut.
struct Splitting {
    /// Every digit by itself, before anything else.
    digits: bool,
    /// The words; `None` for those of GPT-2.
    pattern: Option<&'static str>,
    /// Whether text is composed (Unicode NFC) first.
    nfc: bool,
    /// Whether a word that is a token is taken whole, even if no merges lead to it.
    ignore_merges: bool,
}

impl Splitting {
    /// The splitting that `tokenizer.ggml.pre` names. Files older than that key are GPT-2's or say `default`.
    fn of(metadata: &Metadata) -> Result<Self> {
        const LLAMA3: &str = concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        );
        const QWEN2: &str = concat!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        );
        let gpt2 = Self { digits: false, pattern: None, nfc: false, ignore_merges: false };
        match metadata.string("tokenizer.ggml.pre")? {
            None | Some("default" | "gpt-2") => Ok(gpt2),
            Some("smollm" | "starcoder" | "refact") => Ok(Self { digits: true, ..gpt2 }),
            Some("llama-bpe" | "llama-v3" | "llama3") => {
                Ok(Self { pattern: Some(LLAMA3), ignore_merges: true, ..gpt2 })
            }
            Some("qwen2" | "deepseek-r1-qwen") => Ok(Self { pattern: Some(QWEN2), nfc: true, ..gpt2 }),
            Some(name) => Err(Error::Unsupported {
                what: format!("the pre-tokenizer `{name}` in {}", metadata.path().display()),
                hint: "known are default, gpt-2, smollm, starcoder, refact, llama-bpe and qwen2; put the model's \
                       tokenizer.json next to the file or use its Hugging Face directory"
                    .into(),
            }),
        }
    }

    fn pre_tokenizer(&self) -> tokenizers::Result<Sequence> {
        let mut steps: Vec<PreTokenizerWrapper> = Vec::new();
        if self.digits {
            steps.push(Digits::new(true).into());
        }
        if let Some(pattern) = self.pattern {
            let pattern = SplitPattern::Regex(pattern.into());
            steps.push(Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?.into());
        }
        steps.push(ByteLevel::new(false, true, self.pattern.is_none()).into());
        Ok(Sequence::new(steps))
    }
}

/// `SentencePiece` BPE, as Hugging Face's first conversion of Llama has it: spaces become [`SPACE`], one is put in
/// front of the text, bytes stand in for what no token covers.
fn sentence_piece(metadata: &Metadata, tokens: &[String], kinds: &[i32], special: SpecialTokens) -> Result<Tokenizer> {
    let merges = match metadata.strings("tokenizer.ggml.merges")? {
        Some(merges) => read_merges(metadata, merges)?,
        None => merges_from_scores(metadata, tokens, kinds)?,
    };
    let unknown = special.unk.map_or(0, |id| id as usize);
    let unknown = tokens.get(unknown).ok_or_else(|| Error::format(metadata.path(), "its tokenizer has no tokens"))?;
    let model = BPE::builder()
        .vocab_and_merges(vocabulary(tokens), merges)
        .unk_token(unknown.clone())
        .fuse_unk(true)
        .byte_fallback(true);
    let mut tokenizer = Tokenizer::new(model.build().map_err(invalid(metadata))?);
    let add_space = metadata.boolean("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let mut normalizers = Vec::new();
    let mut decoders = vec![
        Replace::new(SPACE, " ").map_err(invalid(metadata))?.into(),
        decoders::byte_fallback::ByteFallback::new().into(),
        decoders::fuse::Fuse::new().into(),
    ];
    if add_space {
        normalizers.push(Prepend::new(SPACE.into()).into());
        decoders.push(decoders::strip::Strip::new(' ', 1, 0).into());
    }
    normalizers.push(Replace::new(" ", SPACE).map_err(invalid(metadata))?.into());
    tokenizer.with_normalizer(Some(normalizers::Sequence::new(normalizers)));
    tokenizer.with_decoder(Some(decoders::sequence::Sequence::new(decoders)));
    Ok(tokenizer)
}

fn vocabulary(tokens: &[String]) -> Vocab {
    // A header with more than 2^32 tokens would be larger than the file that was read.
    tokens.iter().cloned().zip(0..).collect()
}

/// `left right`, separated by the first space that is not the first character.
fn read_merges(metadata: &Metadata, merges: &[String]) -> Result<Vec<(String, String)>> {
    let cut = |merge: &String| {
        let space = merge.char_indices().skip(1).find(|&(_, character)| character == ' ');
        space.map(|(at, _)| (merge[..at].to_owned(), merge[at + 1..].to_owned())).ok_or_else(|| {
            Error::format(metadata.path(), format!("the merge {merge:?} is not two tokens with a space between them"))
        })
    };
    merges.iter().map(cut).collect()
}

/// The merges that a `SentencePiece` vocabulary implies, best first. Tokens of equal score are ordered as Hugging Face
/// does: longer left part first, then longer right part, then as in the vocabulary.
fn merges_from_scores(metadata: &Metadata, tokens: &[String], kinds: &[i32]) -> Result<Vec<(String, String)>> {
    let key = "tokenizer.ggml.scores";
    let scores = metadata.required(key, metadata.floats(key)?)?;
    same_length(metadata, key, scores.len(), tokens.len())?;
    if let Some(long) = tokens.iter().find(|token| token.len() > MAX_PIECE) {
        let what = format!("its tokenizer has a token of {} bytes, expected at most {MAX_PIECE}", long.len());
        return Err(Error::format(metadata.path(), what));
    }
    let ids = vocabulary(tokens);
    let mut merges = Vec::new();
    for ((token, &score), &kind) in tokens.iter().zip(scores).zip(kinds) {
        // Text is never merged into the others: control tokens and bytes are not text, unused tokens are switched off.
        if !matches!(kind, token_type::NORMAL | token_type::USER_DEFINED) {
            continue;
        }
        let mut cuts: Vec<_> = (token.char_indices().skip(1))
            .map(|(at, _)| token.split_at(at))
            .filter_map(|(left, right)| Some(((ids.get(left)?, ids.get(right)?), left, right)))
            .collect();
        cuts.sort_unstable_by_key(|&(ids, ..)| ids);
        merges.extend(cuts.into_iter().map(|(_, left, right)| (score, left, right)));
    }
    let length = |text: &str| Reverse(text.chars().count());
    merges
        .sort_by(|a, b| b.0.total_cmp(&a.0).then_with(|| (length(a.1), length(a.2)).cmp(&(length(b.1), length(b.2)))));
    Ok(merges.into_iter().map(|(_, left, right)| (left.to_owned(), right.to_owned())).collect())
}

/// What puts `bos` before and `eos` after a text. Written as data, because the short notation of templates forbids some
/// of the characters that tokens are made of.
fn template(metadata: &Metadata, tokens: &[String], special: SpecialTokens) -> Result<Option<TemplateProcessing>> {
    let token = |id: Option<u32>, wanted: bool| id.filter(|_| wanted).map(|id| (id, &tokens[id as usize]));
    let (bos, eos) = (token(special.bos, special.add_bos), token(special.eos, special.add_eos));
    if bos.is_none() && eos.is_none() {
        return Ok(None);
    }
    let piece = |token: Option<(u32, &String)>, part: u32| {
        token.map(|(_, name)| json!({ "SpecialToken": { "id": name, "type_id": part } }))
    };
    let text = |name: &str, part: u32| {
        let text = json!({ "Sequence": { "id": name, "type_id": part } });
        piece(bos, part).into_iter().chain([text]).chain(piece(eos, part)).collect::<Vec<_>>()
    };
    let entries = [bos, eos].into_iter().flatten();
    let special: serde_json::Map<_, _> =
        entries.map(|(id, name)| (name.clone(), json!({ "id": name, "ids": [id], "tokens": [name] }))).collect();
    let pair = [text("A", 0), text("B", 1)].concat();
    let template = json!({
        "type": "TemplateProcessing",
        "single": text("A", 0),
        "pair": pair,
        "special_tokens": special,
    });
    serde_json::from_value(template).map(Some).map_err(|error| invalid(metadata)(error.into()))
}

/// For `map_err` on what the tokenizers library refuses.
fn invalid(metadata: &Metadata) -> impl Fn(tokenizers::Error) -> Error {
    |error| Error::format(metadata.path(), format!("its tokenizer is not valid: {error}"))
}
