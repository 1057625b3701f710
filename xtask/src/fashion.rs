//! A small task made from Fashion-MNIST, as IDX files for `peft train`: the whole is too much for a comparison of many methods on a CPU.
//!
//! `small-train` has 400 pictures of each of the ten classes, `small-valid` 100, both from the training set; `small-test` has 200, from the test set.
//! They are the first of each class, in the order of their file, and no picture is in two of them.

use crate::error::{Error, Result};
use flate2::read::GzDecoder;
use std::fs::{self, File};
use std::io::Read;
use std::ops::Range;
use std::path::Path;

/// Name of a part, the set that it is from, and which pictures of each class it has.
const PARTS: [(&str, &str, Range<usize>); 3] =
    [("train", "train", 0..400), ("valid", "train", 400..500), ("test", "t10k", 0..200)];

const CLASSES: usize = 10;

const SIDE: usize = 28;

/// Pictures and their labels, in the order of the files.
struct Set {
    /// `[count, SIDE, SIDE]`
    pixels: Vec<u8>,
    labels: Vec<u8>,
}

/// Writes the parts into the folder of the data set.
pub(crate) fn make_parts(directory: &Path) -> Result<()> {
    for (part, from, of_class) in PARTS {
        let chosen = Set::read(directory, from)?.choose(of_class.clone());
        if chosen.labels.len() != CLASSES * of_class.len() {
            let problem = format!("expected {} pictures of each class in {from}, found fewer", of_class.end);
            return Err(Error::Malformed { path: directory.to_owned(), problem });
        }
        chosen.write(directory, &format!("small-{part}"))?;
    }
    Ok(())
}

impl Set {
    fn read(directory: &Path, name: &str) -> Result<Self> {
        let labels = values(&directory.join(format!("{name}-labels-idx1-ubyte.gz")), &[])?;
        let pixels = values(&directory.join(format!("{name}-images-idx3-ubyte.gz")), &[SIDE, SIDE])?;
        if pixels.len() != labels.len() * SIDE * SIDE {
            let problem = format!(
                "{name}: expected as many pictures as labels, {}, found {}",
                labels.len(),
                pixels.len() / SIDE / SIDE
            );
            return Err(Error::Malformed { path: directory.to_owned(), problem });
        }
        Ok(Self { pixels, labels })
    }

    /// Those whose place among the pictures of their class is in the range.
    fn choose(&self, of_class: Range<usize>) -> Self {
        let mut seen = [0; CLASSES];
        let mut chosen = Self { pixels: Vec::new(), labels: Vec::new() };
        for (picture, &label) in self.pixels.chunks_exact(SIDE * SIDE).zip(&self.labels) {
            let Some(seen) = seen.get_mut(usize::from(label)) else { continue };
            if of_class.contains(seen) {
                chosen.pixels.extend(picture);
                chosen.labels.push(label);
            }
            *seen += 1;
        }
        chosen
    }

    fn write(&self, directory: &Path, name: &str) -> Result<()> {
        let write = |kind: &str, sizes: &[usize], values: &[u8]| {
            let path = directory.join(format!("{name}-{kind}-ubyte"));
            let content = [&header(self.labels.len(), sizes)[..], values].concat();
            fs::write(&path, content).map_err(|error| Error::io("write", &path, error))
        };
        write("images-idx3", &[SIDE, SIDE], &self.pixels)?;
        write("labels-idx1", &[], &self.labels)
    }
}

/// The values of a compressed IDX file of bytes, whose sizes are a count and then `sizes`.
fn values(path: &Path, sizes: &[usize]) -> Result<Vec<u8>> {
    let file = File::open(path).map_err(|error| Error::io("read", path, error))?;
    let mut content = Vec::new();
    GzDecoder::new(file).read_to_end(&mut content).map_err(|error| Error::io("decompress", path, error))?;
    let length = header(0, sizes).len();
    let count = content.len().saturating_sub(length) / sizes.iter().product::<usize>();
    if !content.starts_with(&header(count, sizes)) {
        let problem = format!("expected the header of an IDX file of {count} × {sizes:?} bytes");
        return Err(Error::Malformed { path: path.to_owned(), problem });
    }
    Ok(content.split_off(length))
}

/// Two zeros, the type of bytes, the number of sizes, and the sizes.
fn header(count: usize, sizes: &[usize]) -> Vec<u8> {
    let sizes = std::iter::once(&count).chain(sizes);
    // A size that does not fit is none that a file of this format can have.
    let words: Vec<[u8; 4]> = sizes.map(|size| u32::try_from(*size).unwrap_or(u32::MAX).to_be_bytes()).collect();
    [&[0, 0, 8, words.len() as u8], words.as_flattened()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use std::io::Write;

    fn compress(path: &Path, content: &[u8]) {
        let mut encoder = GzEncoder::new(File::create(path).unwrap(), Compression::fast());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap();
    }

    /// A set whose classes take turns; a picture is filled with its number, by 251.
    fn put(directory: &Path, name: &str, count: usize) {
        let word = |value: usize| u32::try_from(value).unwrap().to_be_bytes();
        let labels: Vec<u8> = (0..count).map(|at| (at % CLASSES) as u8).collect();
        let pixels: Vec<u8> = (0..count).flat_map(|at| [(at % 251) as u8; SIDE * SIDE]).collect();
        let images = [&[0, 0, 8, 3][..], &word(count), &word(28), &word(28), &pixels].concat();
        compress(&directory.join(format!("{name}-images-idx3-ubyte.gz")), &images);
        let labels = [&[0, 0, 8, 1][..], &word(count), &labels].concat();
        compress(&directory.join(format!("{name}-labels-idx1-ubyte.gz")), &labels);
    }

    #[test]
    fn parts_are_balanced_and_apart() {
        let directory = tempfile::tempdir().unwrap();
        put(directory.path(), "train", 5010);
        put(directory.path(), "t10k", 2000);
        make_parts(directory.path()).unwrap();
        for (part, first, count) in [("train", 0, 4000), ("valid", 4000, 1000), ("test", 0, 2000)] {
            let read = |kind| fs::read(directory.path().join(format!("small-{part}-{kind}-ubyte"))).unwrap();
            let (images, labels) = (read("images-idx3"), read("labels-idx1"));
            let word = u32::try_from(count).unwrap().to_be_bytes();
            assert_eq!(images[..16], [&[0, 0, 8, 3][..], &word, &[0, 0, 0, 28, 0, 0, 0, 28]].concat());
            assert_eq!(labels[..8], [&[0, 0, 8, 1][..], &word].concat());
            // In turns, so that the first of each class are the first of all.
            let pictures: Vec<u8> = images[16..].chunks(SIDE * SIDE).map(|picture| picture[783]).collect();
            assert_eq!(pictures, (first..first + count).map(|at| (at % 251) as u8).collect::<Vec<_>>());
            assert_eq!(labels[8..], (0..count).map(|at| (at % CLASSES) as u8).collect::<Vec<_>>());
        }
    }

    #[test]
    fn what_is_too_small_or_of_another_form_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        put(directory.path(), "train", 4990);
        put(directory.path(), "t10k", 2000);
        let refused = || make_parts(directory.path()).unwrap_err().to_string();
        let found = refused();
        assert!(found.contains("expected 500 pictures of each class in train"), "{found}");
        compress(&directory.path().join("train-labels-idx1-ubyte.gz"), &[0, 0, 8, 1, 0, 0, 0, 2, 7]);
        let found = refused();
        assert!(found.contains("train-labels-idx1-ubyte.gz: expected the header"), "{found}");
        compress(&directory.path().join("train-labels-idx1-ubyte.gz"), &[0, 0, 8, 1, 0, 0, 0, 1, 7]);
        let found = refused();
        assert!(found.contains("expected as many pictures as labels, 1, found 4990"), "{found}");
    }
}
