//! What the commands know about the workspace they belong to.

use crate::error::{Error, Result};
use crate::process;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the test command type-checks beyond the default features, which it builds and runs. CUDA comes on top where its SDK can be had.
pub(crate) const CHECKED: &str = "peft-cli/vulkan";

/// The directory of the workspace, whatever the directory `cargo xtask` was called in.
pub(crate) fn root() -> PathBuf {
    let manifest = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().map_or_else(|| PathBuf::from("."), PathBuf::from)
}

/// The part of `cargo metadata` that the commands use.
#[derive(Deserialize)]
pub(crate) struct Metadata {
    /// Where Cargo builds.
    pub(crate) target_directory: PathBuf,
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    manifest_path: PathBuf,
    targets: Vec<Target>,
    metadata: Option<PackageMetadata>,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

/// The table `[package.metadata]` of a manifest.
#[derive(Deserialize)]
struct PackageMetadata {
    #[serde(default, rename = "not-run")]
    not_run: BTreeMap<String, String>,
}

/// An example program, and why the test command only compiles it, if so.
pub(crate) struct Example {
    /// The name of the program.
    pub(crate) name: String,
    /// The reason given in `[package.metadata.not-run]` of its package.
    pub(crate) not_run: Option<String>,
}

impl Metadata {
    /// Asks Cargo about the members.
    pub(crate) fn read() -> Result<Self> {
        Self::ask(&["--no-deps"])
    }

    /// Asks Cargo about the members and all that they depend on with these features.
    pub(crate) fn of_everything(features: &str) -> Result<Self> {
        Self::ask(&["--features", features])
    }

    fn ask(words: &[&str]) -> Result<Self> {
        let text = process::capture(Command::new("cargo").args(["metadata", "--format-version", "1"]).args(words))?;
        serde_json::from_str(&text).map_err(|error| {
            Error::Failed(format!("`cargo metadata` printed something else than its format 1: {error}"))
        })
    }

    /// Where the sources of a package lie.
    pub(crate) fn folder_of(&self, name: &str) -> Result<&Path> {
        let package = self.packages.iter().find(|package| package.name == name);
        let folder = package.and_then(|package| package.manifest_path.parent());
        folder.ok_or_else(|| Error::Failed(format!("nothing here depends on {name}")))
    }

    /// The examples of the package `peft-examples`, in order.
    pub(crate) fn examples(&self) -> Vec<Example> {
        let packages = self.packages.iter().filter(|package| package.name == "peft-examples");
        let mut examples: Vec<_> = packages
            .flat_map(|package| {
                let targets = package.targets.iter().filter(|target| target.kind.iter().any(|kind| kind == "example"));
                targets.map(|target| Example { name: target.name.clone(), not_run: package.not_run(&target.name) })
            })
            .collect();
        examples.sort_by(|a, b| a.name.cmp(&b.name));
        examples
    }
}

impl Package {
    fn not_run(&self, example: &str) -> Option<String> {
        self.metadata.as_ref()?.not_run.get(example).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn examples_are_found_with_the_reason_not_to_run_them() {
        let text = r#"{"target_directory": "/t", "packages": [
            {"name": "peft", "manifest_path": "/w/crates/peft/Cargo.toml", "targets": [{"name": "other", "kind": ["example"]}], "metadata": null},
            {"name": "peft-examples", "manifest_path": "/w/examples/Cargo.toml", "metadata": {"not-run": {"long": "takes an hour"}}, "targets": [
                {"name": "short", "kind": ["example"]}, {"name": "long", "kind": ["example"]}, {"name": "peft_examples", "kind": ["lib"]}]}]}"#;
        let metadata: Metadata = serde_json::from_str(text).unwrap();
        let found: Vec<_> = metadata.examples().into_iter().map(|example| (example.name, example.not_run)).collect();
        assert_eq!(found, [("long".to_owned(), Some("takes an hour".to_owned())), ("short".to_owned(), None)]);
        assert_eq!(metadata.folder_of("peft").unwrap(), Path::new("/w/crates/peft"));
        assert!(metadata.folder_of("absent").unwrap_err().to_string().contains("absent"));
    }
}
