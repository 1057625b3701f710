//! From rows to what an encoder reads: texts become tokens once, pictures become pixels batch by batch.

use std::fmt;
use std::ops::AddAssign;

use burn::tensor::{Device, Tensor};
use peft_models::PretrainedEncoder;
use peft_models::encoder::Input;
use peft_models::heads::Task;
use peft_models::image::ImageProcessor;
use peft_models::tokenizer::{Encoded, Pairs};

use super::batch::{BatchOptions, Example};
use super::labelled::{Content, LabelledRow, Picture};
use super::labels::{Target, target};
use crate::{Error, Result};

/// Most tokens of a text, unless the caller or the model says otherwise.
pub const MAX_TOKENS: usize = 512;

/// What makes an encoder's input of rows.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one a run")]
pub enum Reader {
    /// For models of text.
    Text(Pairs),
    /// For models of pictures.
    Pictures(ImageProcessor),
}

/// Content on its way into a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Prepared {
    form: Form,
    /// For words: the word of each token; `None` for special tokens.
    pub words: Vec<Option<usize>>,
    /// Whether a text was longer than the model takes.
    pub cut: bool,
}

#[derive(Clone, Debug, PartialEq)]
enum Form {
    Tokens(Encoded),
    Picture(Picture),
}

impl Prepared {
    /// Tokens; 1 for a picture.
    pub fn length(&self) -> usize {
        match &self.form {
            Form::Tokens(tokens) => tokens.ids.len(),
            Form::Picture(_) => 1,
        }
    }

    /// The tokens of a text.
    pub fn tokens(&self) -> Option<&Encoded> {
        match &self.form {
            Form::Tokens(tokens) => Some(tokens),
            Form::Picture(_) => None,
        }
    }
}

impl Reader {
    /// What this model needs; a text has at most `max_tokens` tokens, special ones included.
    ///
    /// # Errors
    /// When the model has no tokenizer or no `preprocessor_config.json`, or does not take texts of that length.
    pub fn new(pretrained: &PretrainedEncoder, max_tokens: Option<usize>) -> Result<Self> {
        let Some(longest) = pretrained.model.max_tokens() else {
            return Ok(Self::Pictures(pretrained.image_processor()?));
        };
        let max_tokens = max_tokens.unwrap_or(MAX_TOKENS.min(longest));
        if max_tokens > longest {
            let what = format!("is {max_tokens}; {} takes at most {longest}", pretrained.files.name);
            return Err(Error::setting("max_len", what));
        }
        Ok(Self::Text(pretrained.tokenizer()?.pairs(max_tokens)?))
    }

    /// Turns content into tokens, and leaves a picture as it is.
    ///
    /// # Errors
    /// When the content is not of the kind that the model reads, or the tokenizer refuses it.
    pub fn prepare(&self, content: &Content) -> Result<Prepared> {
        let mismatch = |expected: &str, found: &str| {
            Error::Model(peft_models::Error::Input { expected: expected.to_owned(), found: found.to_owned() })
        };
        match (self, content) {
            (Self::Text(pairs), Content::Text { text, pair }) => {
                let tokens = pairs.encode(text, pair.as_deref())?;
                let cut = is_cut(&tokens, [Some(text.as_str()), pair.as_deref()]);
                Ok(Prepared { form: Form::Tokens(tokens), words: Vec::new(), cut })
            }
            (Self::Text(pairs), Content::Words(words)) => {
                let words: Vec<&str> = words.iter().map(String::as_str).collect();
                let (tokens, of) = pairs.encode_words(&words)?;
                let cut = is_cut(&tokens, [Some(words.join(" ").as_str()), None]);
                Ok(Prepared { form: Form::Tokens(tokens), words: of, cut })
            }
            (Self::Pictures(_), Content::Picture(picture)) => {
                Ok(Prepared { form: Form::Picture(picture.clone()), words: Vec::new(), cut: false })
            }
            (Self::Text(_), Content::Picture(_)) => Err(mismatch("a text", "a picture")),
            (Self::Pictures(_), _) => Err(mismatch("a picture", "a text")),
        }
    }

    /// The input of a batch.
    ///
    /// # Errors
    /// When a picture cannot be read, or those of a batch do not have one size.
    pub fn input<'a>(&self, rows: impl IntoIterator<Item = &'a Prepared>, device: &Device) -> Result<Input> {
        match self {
            Self::Text(pairs) => {
                let rows: Vec<Encoded> = rows.into_iter().filter_map(|row| row.tokens().cloned()).collect();
                Ok(Input::Text(pairs.batch(&rows, device)))
            }
            Self::Pictures(processor) => {
                let pictures = rows.into_iter().filter_map(|row| match &row.form {
                    Form::Picture(picture) => Some(picture),
                    Form::Tokens(_) => None,
                });
                let pixels = pictures.map(|picture| pixels(processor, picture, device)).collect::<Result<Vec<_>>>()?;
                let size = |tensor: &Tensor<4>| tensor.dims();
                if let [first, rest @ ..] = &pixels[..]
                    && let Some(other) = rest.iter().find(|tensor| size(tensor) != size(first))
                {
                    let what = |[_, _, height, width]: [usize; 4]| format!("{height} × {width} pixels");
                    let (expected, found) = (what(size(first)), what(size(other)));
                    return Err(peft_models::Error::Input { expected, found }.into());
                }
                Ok(Input::Pixels(Tensor::cat(pixels, 0)))
            }
        }
    }
}

fn pixels(processor: &ImageProcessor, picture: &Picture, device: &Device) -> Result<Tensor<4>> {
    Ok(match picture {
        Picture::File(path) => processor.read(path, device)?,
        Picture::Grey { values, height, width } => {
            let colours = values.iter().flat_map(|grey| [*grey; 3]).collect();
            processor.pixels_of(colours, *height, *width, device)?
        }
    })
}

/// Whether the tokens end before one of the texts does.
fn is_cut(tokens: &Encoded, texts: [Option<&str>; 2]) -> bool {
    let end = |of: usize| {
        let ends = tokens.texts.iter().zip(&tokens.offsets).filter(|(text, _)| **text == Some(of));
        ends.map(|(_, offsets)| offsets.end).max().unwrap_or(0)
    };
    texts.iter().enumerate().any(|(at, text)| text.is_some_and(|text| end(at) < text.trim_end().len()))
}

/// A row that a model can learn from.
#[derive(Clone, Debug, PartialEq)]
pub struct Labelled {
    /// What goes in.
    pub content: Prepared,
    /// What should come out.
    pub target: Target,
    /// The task that it is of, from 0.
    pub task: usize,
}

impl Example for Labelled {
    type Batch = Vec<Self>;

    fn length(&self) -> usize {
        self.content.length()
    }

    fn batch(rows: &[Vec<&Self>], _options: &BatchOptions) -> Vec<Self> {
        rows.iter().flatten().map(|row| (*row).clone()).collect()
    }
}

/// What [`label`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LabelReport {
    /// Rows given.
    pub rows: usize,
    /// Tokens of all; none where they are pictures.
    pub tokens: usize,
    /// Texts longer than the model takes, of which the end is not seen.
    pub rows_cut: usize,
    /// Rows without a label to learn, which are left out.
    pub rows_skipped: usize,
}

impl AddAssign for LabelReport {
    fn add_assign(&mut self, other: Self) {
        let Self { rows, tokens, rows_cut, rows_skipped } = other;
        self.rows += rows;
        self.tokens += tokens;
        self.rows_cut += rows_cut;
        self.rows_skipped += rows_skipped;
    }
}

impl fmt::Display for LabelReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rows", self.rows)?;
        let mut note = |count: usize, before: &str, what: &str| {
            if count > 0 { write!(f, "{before} {count} {what}") } else { Ok(()) }
        };
        note(self.tokens, ",", "tokens")?;
        note(self.rows_cut, ";", "cut at max_len")?;
        note(self.rows_skipped, ";", "skipped, no label to learn")
    }
}

/// Turns rows into what a model of that task learns from, in their order.
///
/// # Errors
/// [`Error::Row`] for a row that does not fit the model or its task; [`Error::Labels`] when no row is left.
pub fn label(rows: &[LabelledRow], reader: &Reader, task: &Task) -> Result<(Vec<Labelled>, LabelReport)> {
    let mut report = LabelReport { rows: rows.len(), ..LabelReport::default() };
    let mut labelled = Vec::with_capacity(rows.len());
    for (index, row) in rows.iter().enumerate() {
        let refused = |what: String| Error::Row { row: index + 1, what };
        let content = reader.prepare(&row.content).map_err(|e| refused(e.to_string()))?;
        let target = target(&row.label, task, &content.words).map_err(refused)?;
        report.rows_cut += usize::from(content.cut);
        if matches!(&target, Target::Each(of) if of.iter().all(Option::is_none)) {
            report.rows_skipped += 1;
            continue;
        }
        report.tokens += content.tokens().map_or(0, |tokens| tokens.ids.len());
        labelled.push(Labelled { content, target, task: 0 });
    }
    if labelled.is_empty() {
        return Err(Error::Labels { what: format!("there is nothing to learn in {report}") });
    }
    Ok((labelled, report))
}
