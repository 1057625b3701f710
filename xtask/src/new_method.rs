//! `cargo xtask new-method`: the file of a new method, complete and tested, to be changed into what the paper says.

use crate::error::{Error, Result};
use clap::Args;
use std::fs;
use std::path::PathBuf;

/// The arguments of `new-method`.
#[derive(Args)]
pub(crate) struct Arguments {
    /// The method's name in `snake_case`, which is also the file's
    name: String,
    /// The crate that it belongs to
    #[arg(long = "crate", default_value = "peft-lora")]
    package: String,
}

/// A method that works, with `{name}`, `{Name}` and `{NAME}` where the new one's name belongs.
const TEMPLATE: &str = include_str!("method.template");

/// Runs `new-method`.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let Arguments { name, package } = arguments;
    check_name(name)?;
    let source = PathBuf::from("crates").join(package).join("src");
    let (file, root) = (source.join(format!("{name}.rs")), source.join("lib.rs"));
    let old = fs::read_to_string(&root).map_err(|error| Error::io("read", &root, error))?;
    if file.exists() {
        return Err(Error::Failed(format!("{} exists already; choose another name", file.display())));
    }
    fs::write(&file, method(name)).map_err(|error| Error::io("write", &file, error))?;
    fs::write(&root, declared(&old, name)).map_err(|error| Error::io("write", &root, error))?;
    println!("{} is a method that works; make it yours, then:", file.display());
    println!("  cargo test --package {package} {name}");
    println!("The command line offers it once it is in the table of `peft-cli`.");
    Ok(())
}

/// The name must do for a module and a file.
fn check_name(name: &str) -> Result<()> {
    let lower = |symbol: char| symbol.is_ascii_lowercase() || symbol.is_ascii_digit() || symbol == '_';
    let good = name.starts_with(|first: char| first.is_ascii_lowercase()) && name.chars().all(lower);
    if good && !name.ends_with('_') && !name.contains("__") {
        return Ok(());
    }
    Err(Error::Failed(format!(
        "`{name}` is no method name: expected snake_case such as `lora_fa`, of letters, digits and single `_`"
    )))
}

/// The name as a type's: `lora_fa` becomes `LoraFa`.
fn type_name(name: &str) -> String {
    let word = |word: &str| {
        word.chars().take(1).map(|first| first.to_ascii_uppercase()).chain(word.chars().skip(1)).collect::<String>()
    };
    name.split('_').map(word).collect()
}

/// The text of the new method's file.
fn method(name: &str) -> String {
    TEMPLATE.replace("{Name}", &type_name(name)).replace("{NAME}", &name.to_uppercase()).replace("{name}", name)
}

/// The crate's root with the new module, its lines among their like, where rustfmt would put them.
fn declared(root: &str, name: &str) -> String {
    let kind = type_name(name);
    let with_module = inserted(root, &["mod ", "pub mod "], &format!("mod {name};"));
    inserted(&with_module, &["pub use "], &format!("pub use {name}::{{{kind}Adapter, {kind}Config}};"))
}

/// The text with one more line, in the order of what follows any of the prefixes; at the end when no line has one.
fn inserted(text: &str, prefixes: &[&str], line: &str) -> String {
    let key = |line: &str| prefixes.iter().find_map(|prefix| Some(line.strip_prefix(prefix)?.to_owned()));
    let mut lines: Vec<&str> = text.lines().collect();
    let greater = lines.iter().position(|old| key(old) > key(line));
    let last = lines.iter().rposition(|old| key(old).is_some());
    lines.insert(greater.or(last.map(|last| last + 1)).unwrap_or(lines.len()), line);
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_place_of_the_template_is_filled() {
        let text = method("lora_fa");
        for expected in ["pub struct LoraFaConfig", "pub struct LoraFaAdapter", "\"LORA_FA\"", "\"lora_fa_g\""] {
            assert!(text.contains(expected), "{expected}");
        }
        assert!(!text.contains("{Name}") && !text.contains("{NAME}") && !text.contains("{name}"));
    }

    #[test]
    fn the_module_is_declared_beside_the_others() {
        let root = "//! Doc.\n\npub mod combine;\nmod lora;\n\npub use lora::{LoraAdapter, LoraConfig};\n";
        let expected = "//! Doc.\n\npub mod combine;\nmod lora;\nmod lora_fa;\n\npub use lora::{LoraAdapter, LoraConfig};\npub use lora_fa::{LoraFaAdapter, LoraFaConfig};\n";
        assert_eq!(declared(root, "lora_fa"), expected);
        assert!(declared(root, "aa").contains("\nmod aa;\npub mod combine;\n"));
        assert!(declared("//! Doc.", "a").starts_with("//! Doc.\nmod a;\npub use a::"));
    }

    #[test]
    fn only_snake_case_is_a_name() {
        for good in ["lora", "lora_fa", "ia3"] {
            check_name(good).unwrap();
        }
        for bad in ["", "LoRA", "3a", "lora-fa", "_a", "a_", "a__b", "../a"] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
