//! An encoder with all that belongs to it, for the task of its checkpoint or for a new one.

use burn::tensor::Device;

use super::{ModelFiles, ModelSource};
use crate::config::{Architecture, EncoderConfig};
use crate::encoder::Naming;
use crate::heads::{HEADS, Task};
use crate::image::ImageProcessor;
use crate::load::{Packing, Precision, Unmatched, load_weights_with};
use crate::tokenizer::Tokenizer;
use crate::{Encoder, Error, Result};

/// How an encoder is loaded.
#[derive(Clone, Debug, Default)]
pub struct EncoderOptions {
    /// What it is to be used for; nothing for what its `config.json` says.
    pub task: Option<Task>,
    /// In which form linear layers come into memory. The head stays dense: it is there to be trained.
    pub packing: Packing,
    /// The type of what is dense.
    pub precision: Precision,
    /// Of the weights of a new head.
    pub seed: u64,
}

/// An encoder and what it was made from.
#[derive(Debug)]
pub struct PretrainedEncoder {
    /// The model, un-adapted, under the names of [`Naming::Modules`]; a file is written under those of [`Naming::Files`].
    pub model: Encoder,
    /// The rest; its `config.json` describes the task of the model.
    pub files: ModelFiles,
    /// What the checkpoint lacks and has new weights, and what of it is not used. A new head must be trained, so name it in `modules_to_save`.
    pub unmatched: Unmatched,
}

impl PretrainedEncoder {
    /// Loads the model onto `device` for the task of its checkpoint, as it is stored.
    ///
    /// # Errors
    /// When a file is missing, malformed or does not fit its configuration; when the model is no encoder that is supported; when the hub cannot be reached.
    pub fn load(source: &ModelSource, device: &Device) -> Result<Self> {
        Self::load_with(source, &EncoderOptions::default(), device)
    }

    /// [`load`](Self::load) as `options` say. Head and pooler may be missing from the checkpoint, and tensors of other heads may be there.
    ///
    /// # Errors
    /// As [`load`](Self::load); and when the checkpoint has a head of another size for the same task, a weight cannot be packed, or the device does not have the
    /// precision.
    pub fn load_with(source: &ModelSource, options: &EncoderOptions, device: &Device) -> Result<Self> {
        Self::from_files(source.open()?, options, device)
    }

    /// [`load_with`](Self::load_with) from files that are open already.
    ///
    /// # Errors
    /// As [`load_with`](Self::load_with).
    pub fn from_files(mut files: ModelFiles, options: &EncoderOptions, device: &Device) -> Result<Self> {
        let Architecture::Encoder(mut config) = files.architecture()? else {
            return Err(Error::Unsupported {
                what: format!("{}: a decoder where an encoder is to be loaded", files.name),
                hint: "bert, roberta, distilbert, vit and dinov2 are encoders; load a decoder with Pretrained"
                    .to_owned(),
            });
        };
        if let Some(task) = &options.task {
            config = config.with_task(task.clone());
            config.describe_task(&mut files.config);
        }
        if config.task.outputs() == Some(0) {
            let (what, hint) = ("a task without labels".to_owned(), "name one label at least".to_owned());
            return Err(Error::Unsupported { what, hint });
        }
        let (model, unmatched) = load_weights_with(
            config.init(options.seed, device),
            files.origin.weights(),
            &with_dense_heads(&options.packing),
            options.precision,
            |name| !is_of_body(name, &config),
            |name| !is_of_body(name, &config),
        )?;
        Ok(Self { model: model.renamed(Naming::Modules), files, unmatched })
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// When the source has none.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        self.files.tokenizer()
    }

    /// What makes pixels of pictures as the model was trained.
    ///
    /// # Errors
    /// When `preprocessor_config.json` is missing, malformed or asks for what is not supported.
    pub fn image_processor(&self) -> Result<ImageProcessor> {
        ImageProcessor::from_dir(self.files.origin.weights().path())
    }
}

/// Whether a tensor of that name is one of those without which the encoder is not itself: no head, no pooler, nothing that only pretraining needs.
fn is_of_body(name: &str, config: &EncoderConfig) -> bool {
    let names = config.family.names(Naming::Files);
    let inner = name.strip_prefix(names.body).and_then(|rest| rest.strip_prefix('.')).unwrap_or(name);
    let buffer = ["embeddings.position_ids", "embeddings.token_type_ids", "embeddings.mask_token"].contains(&inner);
    !buffer && ["embeddings", names.layers, "layernorm"].iter().any(|part| is_below(inner, part))
}

fn is_below(name: &str, module: &str) -> bool {
    name.strip_prefix(module).is_some_and(|rest| rest.starts_with('.'))
}

fn with_dense_heads(packing: &Packing) -> Packing {
    let mut packing = packing.clone();
    if let Packing::Quantize(quantization) | Packing::Requantize(quantization) = &mut packing {
        quantization.skip.extend(HEADS.map(str::to_owned));
    }
    packing
}
