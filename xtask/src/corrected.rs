//! This workspace with one dependency corrected, for Vulkan in software.
//!
//! `cubecl-spirv` 0.11.3 swaps two types where a device lacks `VK_KHR_workgroup_memory_explicit_layout`: a variable in shared memory becomes a
//! pointer to a pointer, which no driver has to understand. Mesa's lavapipe crashes on it, `SwiftShader` multiplies matrices wrongly. GPUs
//! have the extension and never come there, so the product uses the crate as it is; only where conformance runs in software, it is built
//! against a corrected copy, in a workspace of symbolic links whose `Cargo.toml` says so. To be dropped with the release that is correct.

use crate::error::{Error, Result};
use crate::process;
use crate::setup::{replace, work_directory};
use crate::workspace::{Metadata, root};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const CRATE: &str = "cubecl-spirv";
const FILE: &str = "src/ops/memory.rs";

/// What is wrong, and what is right; each stands in [`FILE`] once.
const CORRECTIONS: [(&str, &str); 2] = [
    ("GlobalVariableOp::new(ctx, value_ty,", "GlobalVariableOp::new(ctx, ty,"),
    ("AddressOfOp::new(ctx, ty,", "AddressOfOp::new(ctx, value_ty,"),
];

/// What lies beside the members and is the corrected workspace's own.
const OWN: [&str; 4] = ["Cargo.toml", "Cargo.lock", "target", ".git"];

/// Makes the corrected workspace inside the target folder, and returns its `Cargo.toml`.
pub(crate) fn workspace() -> Result<PathBuf> {
    let metadata = Metadata::of_everything("peft-cli/vulkan")?;
    let source = metadata.folder_of(CRATE)?;
    let directory = metadata.target_directory.join("corrected");
    let copy = directory.join(source.file_name().unwrap_or(CRATE.as_ref()));
    if !copy.exists() {
        let work = work_directory(&copy)?;
        let ready = work.path().join(CRATE);
        process::capture(Command::new("cp").arg("-r").arg(source).arg(&ready))?;
        let file = ready.join(FILE);
        write(&file, &corrected(&read(&file)?).map_err(|problem| Error::Malformed { path: file.clone(), problem })?)?;
        replace(&ready, &copy)?;
    }
    let root = root();
    let entries = fs::read_dir(&root).map_err(|source| Error::io("read", &root, source))?;
    let members = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let members = members.filter(|path| !OWN.iter().any(|own| path.ends_with(own)));
    process::capture(Command::new("ln").arg("-sfn").args(members).arg(&directory))?;
    let patch = format!("\n[patch.crates-io]\n{CRATE} = {{ path = {copy:?} }}\n");
    let manifest = directory.join("Cargo.toml");
    write(&manifest, &(read(&root.join("Cargo.toml"))? + &patch))?;
    write(&directory.join("Cargo.lock"), &read(&root.join("Cargo.lock"))?)?;
    Ok(manifest)
}

/// The text with the corrections in it; why not, when this is another version of the file.
fn corrected(text: &str) -> std::result::Result<String, String> {
    let mut text = text.to_owned();
    for (wrong, right) in CORRECTIONS {
        let times = text.matches(wrong).count();
        if times != 1 {
            return Err(format!("`{wrong}` stands here {times} times instead of once: is a correction still needed?"));
        }
        text = text.replace(wrong, right);
    }
    Ok(text)
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|source| Error::io("read", path, source))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|source| Error::io("write", path, source))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_correction_is_made_once_or_refused() {
        let [(first, right_first), (second, right_second)] = CORRECTIONS;
        let text = format!("{first} a); {second} b);");
        assert_eq!(corrected(&text).unwrap(), format!("{right_first} a); {right_second} b);"));
        assert!(corrected(&text.repeat(2)).unwrap_err().contains("2 times"));
        assert!(corrected(&corrected(&text).unwrap()).unwrap_err().contains("0 times"));
    }
}
