use std::fs;
use std::io::Write;
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use tempfile::TempDir;

use super::*;

fn read(name: &str, content: impl AsRef<[u8]>) -> Result<Vec<LabelledRow>> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    fs::write(&path, content).unwrap();
    read_labelled(&path)
}

fn refused(name: &str, content: impl AsRef<[u8]>) -> String {
    read(name, content).unwrap_err().to_string()
}

fn text_row(text: &str, pair: Option<&str>, label: Label) -> LabelledRow {
    LabelledRow { content: Content::Text { text: text.to_owned(), pair: pair.map(str::to_owned) }, label }
}

fn one(label: &str) -> Label {
    Label::One(label.to_owned())
}

fn list(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn json_rows_are_known_by_their_keys() {
    let rows = read(
        "rows.jsonl",
        r#"{"text": "a", "label": "yes", "id": 7}
{"text": "a", "text_pair": "b", "label": 3}
{"text": "a", "text_pair": null, "label": 0.5}
{"text": "a", "labels": ["x", "y"]}
{"text": "a", "label": []}
{"tokens": ["New", "York"], "labels": [1, -100]}"#,
    )
    .unwrap();
    let words =
        LabelledRow { content: Content::Words(list(&["New", "York"])), label: Label::Each(list(&["1", IGNORED])) };
    let expected = [
        text_row("a", None, one("yes")),
        text_row("a", Some("b"), one("3")),
        text_row("a", None, one("0.5")),
        text_row("a", None, Label::Many(list(&["x", "y"]))),
        text_row("a", None, Label::Many(Vec::new())),
        words,
    ];
    assert_eq!(rows, expected);
}

#[test]
fn csv_columns_are_known_by_their_names() {
    let content = "\u{feff}label,text,text_pair\r\n1,\"He said \"\"no, never\"\",\nand left.\",b\r\nyes,plain,\r\n";
    let expected =
        [text_row("He said \"no, never\",\nand left.", Some("b"), one("1")), text_row("plain", None, one("yes"))];
    assert_eq!(read("rows.csv", content).unwrap(), expected);
    assert_eq!(read("rows.tsv", "text\tlabel\na, b\t1\n").unwrap(), [text_row("a, b", None, one("1"))]);
}

#[test]
fn rows_that_are_wrong_are_named_by_file_and_line() {
    let found = refused("rows.jsonl", "{\"text\": \"a\", \"label\": 1}\n{\"text\": \"a\"}\n");
    assert!(found.ends_with("rows.jsonl, line 2: \"label\" is missing"), "{found}");
    let found = refused("rows.json", r#"[{"text": "a", "label": {"x": 1}}]"#);
    assert!(found.ends_with("row 1: \"label\": expected texts or numbers, found an object"), "{found}");
    let found = refused("rows.jsonl", r#"{"tokens": ["a", "b"], "labels": ["O"]}"#);
    assert!(found.ends_with("2 words and 1 labels; expected one for each"), "{found}");
    let found = refused("rows.jsonl", r#"{"tokens": ["a", " "], "labels": ["O", "O"]}"#);
    assert!(found.ends_with("\"tokens\": word 2 is empty"), "{found}");
    let found = refused("rows.jsonl", r#"{"sentence": "a", "label": 1}"#);
    assert!(found.contains("or \"tokens\" and \"labels\"; found the keys \"sentence\", \"label\""), "{found}");
    let found = refused("rows.csv", "sentence,label\na,1\n");
    assert!(found.contains("line 1: expected the columns text and label") && found.contains("\"sentence\""), "{found}");
    let found = refused("rows.csv", "text,label\na,1\nb, c,1\n");
    assert!(found.contains("line 3: expected 2 columns, found 3; a text with commas"), "{found}");
    let found = refused("rows.csv", "text,label\na,1\nb,\n");
    assert!(found.ends_with("line 3: the label is empty"), "{found}");
    assert!(refused("rows.csv", "text,label\n").contains("no row after the names of the columns"));
    assert!(refused("rows.txt", "a").contains("expected .json, .jsonl, .csv or .tsv"));
    assert!(matches!(read_labelled(Path::new("no-such.csv")), Err(Error::Io { .. })));
}

#[test]
fn a_folder_for_each_class() {
    let dir = TempDir::new().unwrap();
    let put = |name: &str| {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    };
    ["cat/b.PNG", "cat/a.jpeg", "dog/c.jpg", "dog/notes.txt", ".cache/x.png", "README.md"].into_iter().for_each(put);
    let rows = read_labelled(dir.path()).unwrap();
    let found: Vec<(String, String)> = rows
        .into_iter()
        .map(|row| match row {
            LabelledRow { content: Content::Picture(Picture::File(path)), label: Label::One(label) } => {
                (path.strip_prefix(dir.path()).unwrap().display().to_string(), label)
            }
            other => panic!("{other:?}"),
        })
        .collect();
    let expected = [("cat/a.jpeg", "cat"), ("cat/b.PNG", "cat"), ("dog/c.jpg", "dog")];
    assert_eq!(found, expected.map(|(path, label)| (path.to_owned(), label.to_owned())));
    fs::create_dir(dir.path().join("empty")).unwrap();
    let error = read_labelled(dir.path()).unwrap_err().to_string();
    assert!(error.contains("empty: no picture for this class"), "{error}");
    let error = read_labelled(TempDir::new().unwrap().path()).unwrap_err().to_string();
    assert!(error.contains("expected a folder for each class"), "{error}");
}

/// An IDX file of bytes.
fn idx(sizes: &[u32], values: &[u8]) -> Vec<u8> {
    let header = [0, 0, 8, sizes.len() as u8].into_iter().chain(sizes.iter().flat_map(|size| size.to_be_bytes()));
    header.chain(values.iter().copied()).collect()
}

/// What reading two files gives, whose names end in `end`.
fn pair(images: &[u8], labels: &[u8], end: &str) -> Result<Vec<LabelledRow>> {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join(format!("train-images-idx3-ubyte{end}"));
    fs::write(&path, images).unwrap();
    fs::write(dir.path().join(format!("train-labels-idx1-ubyte{end}")), labels).unwrap();
    read_labelled(&path)
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn idx_files_with_and_without_gzip() {
    let (images, labels) = (idx(&[2, 2, 3], &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 255]), idx(&[2], &[9, 0]));
    let grey = |values: [u8; 6], label: &str| LabelledRow {
        content: Content::Picture(Picture::Grey { values: values.to_vec(), height: 2, width: 3 }),
        label: one(label),
    };
    let expected = [grey([0, 1, 2, 3, 4, 5], "9"), grey([6, 7, 8, 9, 10, 255], "0")];
    assert_eq!(pair(&images, &labels, "").unwrap(), expected);
    assert_eq!(pair(&gzip(&images), &gzip(&labels), ".gz").unwrap(), expected);
}

#[test]
fn hostile_idx_files_are_refused_before_they_are_read() {
    let labels = idx(&[2], &[0, 1]);
    let refused = |images: &[u8], labels: &[u8], end: &str| pair(images, labels, end).unwrap_err().to_string();
    let huge = idx(&[u32::MAX, u32::MAX, u32::MAX], &[0; 8]);
    assert!(refused(&huge, &labels, "").contains("are more than the file can hold"));
    assert!(refused(&gzip(&huge), &gzip(&labels), ".gz").contains("are more than the file can hold"));
    let short = idx(&[2, 1, 2], &[0; 3]);
    assert!(refused(&short, &labels, "").contains("make 4 values, found 3"));
    let long = idx(&[2, 1, 2], &[0; 5]);
    assert!(refused(&long, &labels, "").contains("make 4 values, found more"));
    let good = idx(&[2, 1, 2], &[0; 4]);
    assert!(refused(&good, &idx(&[3], &[0; 3]), "").contains("3 labels for 2 pictures"));
    assert!(refused(&good, &good, "").contains("of rank 1, found the header [0, 0, 8, 3]"));
    assert!(refused(&good[..6], &labels, "").contains("ends early"));
    assert!(refused(&good, &labels, ".gz").contains("not what its name says"));
    assert!(refused(&idx(&[0, 1, 2], &[]), &idx(&[0], &[]), "").contains("at least one pixel"));
    let dir = TempDir::new().unwrap();
    let alone = dir.path().join("t10k-images-idx3-ubyte");
    fs::write(&alone, &good).unwrap();
    let error = read_labelled(&alone).unwrap_err().to_string();
    assert!(error.contains("labels are missing") && error.contains("t10k-labels-idx1-ubyte"), "{error}");
}
