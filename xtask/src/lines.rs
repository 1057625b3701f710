//! `cargo xtask lines`: how long files, methods and functions are, against the budgets that keep the workspace readable; and where `unsafe` is.
//!
//! Code is what is left without blank lines, comments and what is compiled for tests only. Rust is not parsed: a scan that knows comments,
//! strings and braces is enough to find functions and test modules in code that rustfmt has formatted.

use crate::error::{Error, Result};
use clap::Args;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The arguments of `lines`.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Fail if a file or function is over its budget without a reason in `xtask/lines-allow.toml`
    #[arg(long)]
    pub(crate) check: bool,
}

/// Lines of a source file, everything counted.
const FILE_BUDGET: usize = 600;
/// Lines of code of a method's file.
const METHOD_BUDGET: usize = 250;
/// Lines of code of a function.
const FUNCTION_BUDGET: usize = 60;
/// The crates whose files are methods.
const METHOD_CRATES: [&str; 5] =
    ["crates/peft-lora", "crates/peft-adapter", "crates/peft-prompt", "crates/peft-moe", "crates/peft-union"];
/// The one crate with `unsafe`, and what a file of it says.
const UNSAFE_CRATE: &str = "peft-kernels";
const ALLOWS_UNSAFE: &str = "allow(unsafe_code";
/// What may be over its budget, and why.
const ALLOWED: &str = "xtask/lines-allow.toml";

/// Runs `lines`.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let mut allowed = read_allowed(Path::new(ALLOWED))?;
    let (mut breaches, mut unsafe_files) = (Vec::new(), Vec::new());
    for package in packages(Path::new("."))? {
        let mut files = Vec::new();
        for path in rust_files(&package)? {
            let text = fs::read_to_string(&path).map_err(|source| Error::io("read", &path, source))?;
            let counted = if path.ends_with("tests.rs") { Counted::tests(&text) } else { Counted::of(&text) };
            if text.contains(ALLOWS_UNSAFE)
                && !path.ends_with(file!())
                && package.file_name() != Some(UNSAFE_CRATE.as_ref())
            {
                unsafe_files.push(path.clone());
            }
            files.push((path, counted));
        }
        print_table(&package, &files);
        breaches.extend(files.iter().flat_map(|(path, counted)| counted.breaches(path, is_method(&package, path))));
    }
    breaches.retain(|breach| allowed.remove(&breach.place).is_none());
    let mut problems: Vec<_> = breaches.iter().map(Breach::to_string).collect();
    problems.extend(unsafe_files.iter().map(|path| format!("{}: `unsafe` outside {UNSAFE_CRATE}", path.display())));
    problems.extend(allowed.keys().map(|place| format!("{place} is within its budget: remove it from {ALLOWED}")));
    for problem in &problems {
        println!("over budget: {problem}");
    }
    if arguments.check && !problems.is_empty() {
        return Err(Error::Failed(format!(
            "{} places are over budget: split them, or give the reason in {ALLOWED} as `\"PATH\" = \"reason\"` or `\"PATH::function\" = \"reason\"`",
            problems.len()
        )));
    }
    Ok(())
}

/// The exceptions: a path, or a path and a function, with the reason.
fn read_allowed(path: &Path) -> Result<BTreeMap<String, String>> {
    let text = fs::read_to_string(path).map_err(|source| Error::io("read", path, source))?;
    let malformed = |problem: String| Error::Malformed { path: path.to_path_buf(), problem };
    let allowed: BTreeMap<String, String> = toml::from_str(&text).map_err(|error| malformed(error.to_string()))?;
    match allowed.iter().find(|(_, reason)| reason.trim().is_empty()) {
        Some((place, _)) => Err(malformed(format!("`{place}` has no reason"))),
        None => Ok(allowed),
    }
}

/// The directories of the workspace that hold a package, relative to its root, in order.
fn packages(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for parent in [root.to_path_buf(), root.join("crates")] {
        for entry in fs::read_dir(&parent).map_err(|source| Error::io("read", &parent, source))? {
            let path = entry.map_err(|source| Error::io("read", &parent, source))?.path();
            if path.join("Cargo.toml").is_file() {
                found.push(path.strip_prefix(root).unwrap_or(&path).to_path_buf());
            }
        }
    }
    found.sort();
    Ok(found)
}

/// The Rust files below a directory, in order.
fn rust_files(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).map_err(|source| Error::io("read", directory, source))? {
        let path = entry.map_err(|source| Error::io("read", directory, source))?.path();
        if path.is_dir() {
            found.extend(rust_files(&path)?);
        } else if path.extension().is_some_and(|end| end == "rs") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Whether a file is a method: everything in a method crate's `src` but its root.
fn is_method(package: &Path, file: &Path) -> bool {
    METHOD_CRATES.iter().any(|method| package == Path::new(method)) && !file.ends_with("lib.rs")
}

fn print_table(package: &Path, files: &[(PathBuf, Counted)]) {
    let sum = |of: fn(&Counted) -> usize| files.iter().map(|(_, counted)| of(counted)).sum::<usize>();
    println!("{}: {} code, {} total", package.display(), sum(|file| file.code), sum(|file| file.total));
    for (path, counted) in files {
        let path = path.strip_prefix(package).unwrap_or(path).display().to_string();
        let longest = counted.functions.iter().max_by_key(|(_, lines)| *lines);
        let longest = longest.map_or_else(String::new, |(name, lines)| format!("  longest {name} {lines}"));
        println!("  {path:34} {:5} code {:5} total{longest}", counted.code, counted.total);
    }
}

/// A file or function over its budget.
struct Breach {
    place: String,
    lines: usize,
    budget: usize,
    unit: &'static str,
}

impl std::fmt::Display for Breach {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} has {} {}, the budget is {}", self.place, self.lines, self.unit, self.budget)
    }
}

/// The sizes of one file.
struct Counted {
    total: usize,
    code: usize,
    /// Name and lines of code of each function outside tests.
    functions: Vec<(String, usize)>,
}

impl Counted {
    fn of(text: &str) -> Self {
        let code = without_tests(&without_comments(text));
        let functions = functions(&code).map(|(name, body)| (name.to_owned(), code_lines(body))).collect();
        Self { total: text.lines().count(), code: code_lines(&code), functions }
    }

    /// A file `tests.rs` is a test module: it has a length, but no code.
    fn tests(text: &str) -> Self {
        Self { total: text.lines().count(), code: 0, functions: Vec::new() }
    }

    fn breaches(&self, path: &Path, is_method: bool) -> Vec<Breach> {
        let place = path.display().to_string();
        let function = |(name, lines): &(String, usize)| Breach {
            place: format!("{place}::{name}"),
            lines: *lines,
            budget: FUNCTION_BUDGET,
            unit: "lines of code",
        };
        let mut all: Vec<_> = self.functions.iter().map(function).collect();
        all.push(Breach { place: place.clone(), lines: self.total, budget: FILE_BUDGET, unit: "lines" });
        if is_method {
            all.push(Breach { place, lines: self.code, budget: METHOD_BUDGET, unit: "lines of code" });
        }
        all.retain(|breach| breach.lines > breach.budget);
        all
    }
}

fn code_lines(code: &str) -> usize {
    code.lines().filter(|line| !line.trim().is_empty()).count()
}

/// The same text with comments blank and the contents of strings and characters replaced, so that braces and words in them do not count.
fn without_comments(text: &str) -> String {
    let mut rest = text;
    let mut out = String::with_capacity(text.len());
    let mut in_word = false;
    while let Some(first) = rest.chars().next() {
        let (length, fill) = match first {
            '/' if rest.starts_with("//") => (rest.find('\n').unwrap_or(rest.len()), ' '),
            '/' if rest.starts_with("/*") => (block_comment(rest), ' '),
            '"' => (string(rest), '"'),
            'b' | 'r' | 'c' if !in_word && raw_string(rest).is_some() => (raw_string(rest).unwrap_or(1), '"'),
            '\'' => (character(rest), '\''),
            other => (other.len_utf8(), other),
        };
        let (token, after) = rest.split_at(length);
        in_word = first.is_alphanumeric() || first == '_';
        out.extend(token.chars().map(|symbol| if symbol == '\n' { '\n' } else { fill }));
        rest = after;
    }
    out
}

/// The length of the block comment at the start, which may hold others.
fn block_comment(text: &str) -> usize {
    let mut depth = 0_usize;
    let mut at = 0;
    while at < text.len() {
        let two = text.as_bytes().get(at..at + 2).unwrap_or_default();
        match two {
            b"/*" => depth += 1,
            b"*/" => depth -= 1,
            _ => {
                at += 1;
                continue;
            }
        }
        at += 2;
        if depth == 0 {
            return at;
        }
    }
    text.len()
}

/// The length of the string at the start.
fn string(text: &str) -> usize {
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// The length of the raw string at the start, if there is one.
fn raw_string(text: &str) -> Option<usize> {
    let body = text.strip_prefix("br").or_else(|| text.strip_prefix("cr")).or_else(|| text.strip_prefix('r'))?;
    let hashes = body.len() - body.trim_start_matches('#').len();
    let inside = body[hashes..].strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    let length = inside.find(&end).map_or(inside.len(), |at| at + end.len());
    Some(text.len() - inside.len() + length)
}

/// The length of the character at the start; of the quote alone when it begins a lifetime.
fn character(text: &str) -> usize {
    let mut symbols = text.char_indices().skip(1);
    match (symbols.next(), symbols.next()) {
        (Some((_, '\\')), Some((after, _))) => text[after..].find('\'').map_or(text.len(), |_| {
            // The escaped symbol may itself be a quote, so the search begins after it.
            let next = after + text[after..].chars().next().map_or(1, char::len_utf8);
            text[next..].find('\'').map_or(text.len(), |end| next + end + 1)
        }),
        (Some(_), Some((end, '\''))) => end + 1,
        _ => 1,
    }
}

/// The same code with every item blank that is compiled for tests only.
fn without_tests(code: &str) -> String {
    let mut out = String::with_capacity(code.len());
    let mut rest = code;
    while let Some(at) = ["#[cfg(test)]", "#[cfg(all(test"].iter().filter_map(|mark| rest.find(mark)).min() {
        let (before, item) = rest.split_at(at);
        let (item, after) = item.split_at(item_length(item));
        out.push_str(before);
        out.extend(item.chars().filter(|symbol| *symbol == '\n'));
        rest = after;
    }
    out + rest
}

/// The length of the item at the start: to its semicolon or to the brace that closes it.
fn item_length(code: &str) -> usize {
    let mut depth = 0_usize;
    for (at, symbol) in code.char_indices() {
        match symbol {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => {
                depth = depth.saturating_sub(1);
                if depth == 0 && symbol == '}' {
                    return at + 1;
                }
            }
            ';' if depth == 0 => return at + 1,
            _ => {}
        }
    }
    code.len()
}

/// Name and text, from `fn` to the closing brace, of each function that has a body.
fn functions(code: &str) -> impl Iterator<Item = (&str, &str)> {
    code.match_indices("fn ").filter_map(|(at, word)| {
        let whole_word = !code[..at].ends_with(|before: char| before.is_alphanumeric() || before == '_');
        let name = code[at + word.len()..].split(|symbol: char| !(symbol.is_alphanumeric() || symbol == '_')).next()?;
        let text = &code[at..at + item_length(&code[at..])];
        (whole_word && !name.is_empty() && text.ends_with('}')).then_some((name, text))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_strings_do_not_count() {
        let text = "let a = \"// {\"; // }\nlet b = r#\"\"{\"#; /* { /* } */ */\nlet c = '{'; let d: &'static str = \"\\\"{\";\nlet e = ['\\'', '\\\\', '}'];\n";
        let code = without_comments(text);
        assert_eq!(code.lines().count(), text.lines().count());
        assert!(!code.contains('{') && !code.contains('}') && !code.contains('/'), "{code}");
        assert!(code.contains("static str") && code.contains("let e = ["), "{code}");
    }

    #[test]
    fn tests_comments_and_blank_lines_are_no_code() {
        let text = "//! Doc.\n\n/* long\n   comment */\nfn one() {\n    // why\n    two();\n}\n\n#[cfg(test)]\nmod tests {\n    fn three() {}\n}\nfn four() {}\n";
        let counted = Counted::of(text);
        assert_eq!((counted.total, counted.code), (14, 4));
        assert_eq!(counted.functions, [("one".to_owned(), 3), ("four".to_owned(), 1)]);
    }

    #[test]
    fn a_text_with_many_lines_in_a_string_is_code() {
        assert_eq!(Counted::of("const A: &str = \"\n// kept\nend\";\n").code, 3);
    }

    #[test]
    fn functions_without_a_body_and_function_types_are_no_functions() {
        let text = "trait A {\n    fn a(&self, b: [u8; 4]);\n    fn c(&self) -> fn (u8) -> u8 {\n        d\n    }\n}\n";
        assert_eq!(Counted::of(text).functions, [("c".to_owned(), 3)]);
    }

    #[test]
    fn what_is_over_its_budget_is_named() {
        let body = "    a();\n".repeat(FUNCTION_BUDGET);
        let long = format!("fn long() {{\n{body}}}\n");
        let breaches = Counted::of(&long).breaches(Path::new("x.rs"), true);
        assert_eq!(breaches.len(), 1);
        assert_eq!(breaches[0].to_string(), "x.rs::long has 62 lines of code, the budget is 60");
        let breaches = Counted::of(&long.repeat(10)).breaches(Path::new("x.rs"), true);
        assert_eq!(breaches.iter().filter(|breach| breach.place == "x.rs").count(), 2);
    }

    #[test]
    fn an_exception_needs_a_reason() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("allow.toml");
        fs::write(&path, "\"a.rs\" = \" \"\n").unwrap();
        let message = read_allowed(&path).unwrap_err().to_string();
        assert!(message.contains("`a.rs` has no reason"), "{message}");
    }
}
