//! Adapters in layouts that are read and not written.

use std::path::Path;

use burn::module::Module;
use peft_core::{Strictness, merge};
use peft_union::{PUBLISHED, read_published};

use super::{AdapterFiles, FilesOn};
use crate::Result;

/// A folder of `MixLoRA`'s authors, by its `peft_type`.
#[derive(Debug)]
pub(super) struct Published(&'static str);

pub(super) const FILES: [Published; 3] = [Published(PUBLISHED[0]), Published(PUBLISHED[1]), Published(PUBLISHED[2])];

impl AdapterFiles for Published {
    fn peft_type(&self) -> &'static str {
        self.0
    }

    fn is_written(&self) -> bool {
        false
    }

    fn convert(&self, dir: &Path, _name: Option<&String>, out: &Path) -> Result<()> {
        Ok(read_published(dir)?.write(out)?)
    }
}

impl<T: Module> FilesOn<T> for Published {
    fn load(&self, model: T, dir: &Path) -> Result<(T, Option<usize>)> {
        let (model, _) = read_published(dir)?.load_into(model, dir, Strictness::default())?;
        Ok((model, None))
    }

    fn merge(&self, model: T, dir: &Path) -> Result<T> {
        let (model, method) = read_published(dir)?.load_into(model, dir, Strictness::default())?;
        Ok(merge(model, &method)?)
    }
}
