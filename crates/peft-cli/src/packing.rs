//! Packed weights as the command line names them.

use indexmap::IndexMap;
use peft_models::load::Packing;
use peft_quant::{Code, Format, Quantization};
use serde::{Deserialize, Serialize};

use crate::output::quoted;
use crate::rows::assignments;
use crate::settings::one_or_many;
use crate::{Error, Result};

/// What the numbers of a packed weight stand for, by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Type {
    /// 4 bits: quantiles of a normal distribution, as in QLoRA
    Nf4,
    /// 4 bits: a small floating-point number
    Fp4,
    /// 8 bits: equal steps
    Int8,
    /// 4 bits: equal steps, the same up and down
    Int4,
    /// 4 bits: equal steps from each block's smallest to its largest value
    Int4Affine,
}

impl Type {
    fn code(self) -> Code {
        match self {
            Self::Nf4 => Code::Nf4,
            Self::Fp4 => Code::Fp4,
            Self::Int8 => Code::Int8,
            Self::Int4 => Code::Int4,
            Self::Int4Affine => Code::Int4Affine,
        }
    }
}

/// In which form the linear layers and the experts of a model come into memory.
#[derive(Clone, Debug, Serialize, Deserialize, clap::Args)]
#[serde(rename_all = "kebab-case", default)]
pub struct PackingArgs {
    /// Pack linear layers and experts while the model is read, to about 4 or 8 bits a value; layers that are stored packed stay as they are, experts are packed anew
    #[arg(long, value_enum, help_heading = "Packed weights", value_name = "TYPE")]
    pub quantize: Option<Type>,
    /// Values that share a scale
    #[arg(long, default_value_t = 64, help_heading = "Packed weights", value_name = "N")]
    pub quantize_block: usize,
    /// Keep the scales in 32 bits instead of packing them too
    #[arg(long, default_value_t = false, num_args = 0..=1, require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set, hide_possible_values = true, help_heading = "Packed weights")]
    pub no_double_quant: bool,
    /// Modules that stay as they are
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "lm_head",
        help_heading = "Packed weights",
        value_name = "NAMES"
    )]
    #[serde(deserialize_with = "one_or_many")]
    pub quantize_skip: Vec<String>,
    /// Another type for some modules, as NAME=TYPE; may be repeated
    #[arg(long, help_heading = "Packed weights", value_name = "NAME=TYPE")]
    #[serde(deserialize_with = "one_or_many")]
    pub quantize_pattern: Vec<String>,
    /// Unpack layers that are stored packed; with --quantize they are packed anew, and lose once more
    #[arg(long, default_value_t = false, num_args = 0..=1, require_equals = true, default_missing_value = "true", action = clap::ArgAction::Set, hide_possible_values = true, help_heading = "Packed weights")]
    pub unpack: bool,
}

impl Default for PackingArgs {
    fn default() -> Self {
        Self {
            quantize: None,
            quantize_block: 64,
            no_double_quant: false,
            quantize_skip: Quantization::default().skip,
            quantize_pattern: Vec::new(),
            unpack: false,
        }
    }
}

impl PackingArgs {
    /// What the loader is told.
    ///
    /// # Errors
    /// When a flag names what does not exist.
    pub fn packing(&self) -> Result<Packing> {
        match (self.quantize, self.unpack) {
            (Some(kind), true) => self.quantization(kind).map(Packing::Requantize),
            (None, true) => Ok(Packing::Dense),
            (None, false) => Ok(Packing::AsStored),
            (Some(kind), false) => self.quantization(kind).map(Packing::Quantize),
        }
    }

    /// These flags again, each with a blank before it, as far as they were given: for a command that must see the same weights.
    pub fn flags(&self) -> String {
        let Some(kind) = self.quantize else {
            return if self.unpack { " --unpack=true".to_owned() } else { String::new() };
        };
        let usual = Self::default();
        let mut flags = format!(" --quantize {}", kind.code().name());
        if self.unpack {
            flags += " --unpack=true";
        }
        if self.quantize_block != usual.quantize_block {
            flags += &format!(" --quantize-block {}", self.quantize_block);
        }
        if self.no_double_quant {
            flags += " --no-double-quant=true";
        }
        if self.quantize_skip != usual.quantize_skip {
            flags += &format!(" --quantize-skip {}", quoted(self.quantize_skip.join(",")));
        }
        for pattern in &self.quantize_pattern {
            flags += &format!(" --quantize-pattern {}", quoted(pattern));
        }
        flags
    }

    /// Which layers are packed, and how.
    ///
    /// # Errors
    /// When a flag names what does not exist.
    pub fn quantization(&self, kind: Type) -> Result<Quantization> {
        let format = |code| {
            // Affine blocks have two numbers each, which double quantisation does not know.
            let double_quant = !self.no_double_quant && code != Code::Int4Affine;
            Format { code, block: self.quantize_block, double_quant }
        };
        if !(32..=4096).contains(&self.quantize_block) || !self.quantize_block.is_power_of_two() {
            let what = format!("--quantize-block {}: expected a power of two from 32 to 4096", self.quantize_block);
            return Err(Error::usage(what, "--quantize-block 64"));
        }
        let mut pattern = IndexMap::new();
        for (name, value) in assignments("quantize-pattern", &self.quantize_pattern)? {
            let kind: Type = clap::ValueEnum::from_str(value, true).map_err(|_| {
                let what = format!("--quantize-pattern {name}={value}: there is no type {value}");
                Error::usage(what, "nf4, fp4, int8, int4 or int4-affine")
            })?;
            pattern.insert(name.to_owned(), format(kind.code()));
        }
        Ok(Quantization { format: format(kind.code()), skip: self.quantize_skip.clone(), pattern })
    }
}
