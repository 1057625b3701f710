//! What an encoder is given on the command line: a text, a pair of texts, or a picture.

use std::path::PathBuf;

use peft_models::PretrainedEncoder;
use peft_train::data::{Content, Picture, Prepared, Reader};

use crate::{Error, Result};

/// One thing to read.
#[derive(Clone, Debug, clap::Args)]
pub struct ContentArgs {
    /// A text
    #[arg(long, value_name = "TEXT", conflicts_with = "image")]
    pub text: Option<String>,
    /// The second text of a pair
    #[arg(long, value_name = "TEXT", requires = "text")]
    pub text_pair: Option<String>,
    /// A picture, PNG or JPEG
    #[arg(long, value_name = "FILE")]
    pub image: Option<PathBuf>,
}

impl ContentArgs {
    /// What was given, ready for the model; of a text its words, where the model labels each.
    ///
    /// # Errors
    /// When nothing was given, or what is not of the kind that the model reads.
    pub fn prepare(&self, pretrained: &PretrainedEncoder, words: bool) -> Result<(Reader, Prepared)> {
        let reader = Reader::new(pretrained, None)?;
        let content = match (&self.text, &self.image) {
            (Some(text), _) if words => Content::Words(text.split_whitespace().map(str::to_owned).collect()),
            (Some(text), _) => Content::Text { text: text.clone(), pair: self.text_pair.clone() },
            (None, Some(path)) => Content::Picture(Picture::File(path.clone())),
            (None, None) => {
                let hint = if matches!(reader, Reader::Text(_)) { "--text \"…\"" } else { "--image picture.png" };
                return Err(Error::usage("there is nothing to read", hint));
            }
        };
        let prepared = reader.prepare(&content)?;
        Ok((reader, prepared))
    }
}
