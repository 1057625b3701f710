//! Four tasks made from VADER's ground truth (Hutto and Gilbert, ICWSM 2014), as CSV files for `peft train`:
//!
//! - `film-polarity`: sentences of film reviews, positive or negative; those whose score is within ±0.5 are left out
//! - `product-polarity`: the same for product reviews
//! - `tweet-score`: tweets with their mean score, −4 to 4
//! - `source`: which of films, products, tweets, editorials a text is from
//!
//! And two as questions to a language model: [`film-words` and `product-stars`](crate::questions).
//!
//! A text is in `train`, `valid` or `test` (80, 10, 10 of 100) by a hash of the document it is from, or of itself where it is from none: the same on every
//! machine, and no document is in two of them.

use crate::error::{Error, Result};
use crate::questions::write_rows;
use std::fs;
use std::path::Path;

/// The files, and what their texts are about.
const FILES: [(&str, &str); 4] = [
    ("movieReviewSnippets_GroundTruth.txt", "films"),
    ("amazonReviewSnippets_GroundTruth.txt", "products"),
    ("tweets_GroundTruth.txt", "tweets"),
    ("nytEditorialSnippets_GroundTruth.txt", "editorials"),
];

/// A score nearer to zero is neither good nor bad.
const UNDECIDED: f64 = 0.5;

const PARTS: [&str; 3] = ["train", "valid", "test"];

/// A rated text.
struct Text {
    source: &'static str,
    part: &'static str,
    score: f64,
    text: String,
}

/// Writes the tasks into the folder of the ground truth.
pub(crate) fn make_tasks(directory: &Path) -> Result<()> {
    let mut texts = Vec::new();
    for (name, source) in FILES {
        let path = directory.join(name);
        let content = fs::read_to_string(&path).map_err(|error| Error::io("read", &path, error))?;
        for (at, line) in content.lines().enumerate() {
            let malformed = || Error::Malformed {
                path: path.clone(),
                problem: format!("line {}: expected a number, a score and a text, with tabs between", at + 1),
            };
            texts.push(parse(line, source).ok_or_else(malformed)?);
        }
    }
    let polarity = |of: &'static str| {
        move |text: &Text| {
            let label = if text.score > 0.0 { "positive" } else { "negative" };
            (text.source == of && text.score.abs() > UNDECIDED).then(|| label.to_owned())
        }
    };
    write(directory, "film-polarity", &texts, polarity("films"))?;
    write(directory, "product-polarity", &texts, polarity("products"))?;
    // A decimal point in every score says that they are no names.
    write(directory, "tweet-score", &texts, |text| (text.source == "tweets").then(|| format!("{:.4}", text.score)))?;
    write(directory, "source", &texts, |text| Some(text.source.to_owned()))?;
    let asked = |of: &'static str, question: &str, answer: &dyn Fn(&Text) -> Option<String>| {
        let texts = texts.iter().filter(|text| text.source == of);
        texts.filter_map(|text| Some((format!("{question}\n\n{}", text.text), answer(text)?))).collect::<Vec<_>>()
    };
    let question = "Is this sentence of a film review positive or negative?";
    write_rows(directory, "film-words", asked("films", question, &polarity("films")))?;
    let question = "How many stars, from one to five, does the author of this sentence give the product?";
    write_rows(directory, "product-stars", asked("products", question, &|text| Some(stars(text.score).to_owned())))
}

/// A score from −4 to 4 as a number of stars.
fn stars(score: f64) -> &'static str {
    match score {
        ..-2.0 => "one star",
        -2.0..-0.5 => "two stars",
        -0.5..0.5 => "three stars",
        0.5..2.0 => "four stars",
        _ => "five stars",
    }
}

/// `number <tab> score <tab> text`, where the number of a part of a document is `document_part`.
fn parse(line: &str, source: &'static str) -> Option<Text> {
    let mut fields = line.splitn(3, '\t');
    let (number, score, text) = (fields.next()?, fields.next()?.trim().parse().ok()?, fields.next()?.trim());
    let origin = number.split_once('_').map_or(text, |(document, _)| document);
    let part = match hash(&format!("{source}:{origin}")) % 10 {
        0..8 => PARTS[0],
        8 => PARTS[1],
        _ => PARTS[2],
    };
    Some(Text { source, part, score, text: text.to_owned() })
}

/// FNV-1a.
pub(crate) fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

fn write(directory: &Path, task: &str, texts: &[Text], label: impl Fn(&Text) -> Option<String>) -> Result<()> {
    for part in PARTS {
        let mut csv = "text,label\n".to_owned();
        for text in texts.iter().filter(|text| text.part == part) {
            if let Some(label) = label(text) {
                csv += &format!("\"{}\",{label}\n", text.text.replace('"', "\"\""));
            }
        }
        let path = directory.join(format!("{task}-{part}.csv"));
        fs::write(&path, csv).map_err(|error| Error::io("write", &path, error))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(directory: &Path, name: &str) -> String {
        fs::read_to_string(directory.join(name)).unwrap()
    }

    #[test]
    fn every_text_is_in_one_part_and_documents_stay_together() {
        let directory = tempfile::tempdir().unwrap();
        for (name, source) in FILES {
            let document = |at: usize| if source == "products" { format!("{}_{at}", at / 20) } else { at.to_string() };
            let score = |at: usize| ["-2.5", "0.5", "3.25"][at % 3];
            let lines: Vec<String> =
                (0..200).map(|at| format!("{}\t{}\t{source}, \"text\" {at}\r\n", document(at), score(at))).collect();
            fs::write(directory.path().join(name), lines.concat()).unwrap();
        }
        make_tasks(directory.path()).unwrap();
        let rows = |task: &str| -> Vec<Vec<String>> {
            let part = |part| read(directory.path(), &format!("{task}-{part}.csv"));
            PARTS.map(|name| part(name).lines().skip(1).map(str::to_owned).collect()).to_vec()
        };
        let count = |task: &str| rows(task).iter().map(Vec::len).sum::<usize>();
        let counts = ["film-polarity", "product-polarity", "tweet-score", "source"].map(count);
        assert_eq!(counts, [133, 133, 200, 800], "a score of 0.5 is no polarity");
        assert!(rows("source").iter().all(|part| part.len() > 40));
        let films = rows("film-polarity").concat();
        assert!(films.contains(&"\"films, \"\"text\"\" 0\",negative".to_owned()), "{films:?}");
        assert!(rows("tweet-score").concat().iter().all(|row| row.ends_with("00")), "four places");
        // Twenty sentences a document: the parts are whole documents.
        let source = rows("source");
        let products = |part: &Vec<String>| part.iter().filter(|row| row.contains("products,")).count();
        assert!(source.iter().all(|part| products(part).is_multiple_of(20)));
    }

    #[test]
    fn a_line_of_another_form_is_named() {
        let directory = tempfile::tempdir().unwrap();
        for (name, _) in FILES {
            fs::write(directory.path().join(name), "1\t0.9\tgood\n2\tno score\n").unwrap();
        }
        let error = make_tasks(directory.path()).unwrap_err().to_string();
        assert!(error.contains("movieReviewSnippets_GroundTruth.txt: line 2: expected a number, a score"), "{error}");
    }
}
