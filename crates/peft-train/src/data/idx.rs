//! IDX, the format of MNIST and Fashion-MNIST: a big-endian header (two zero bytes, the type, the rank, the sizes), then values row by row.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;

use super::labelled::{Content, Label, LabelledRow, Picture};
use crate::{Error, Result};

/// The type of unsigned bytes, the only one that pictures come in.
const BYTES: u8 = 0x08;
/// No file shrinks more by gzip.
const MOST_SHRINKING: u64 = 1032;

/// Pictures with the labels from the file beside them, whose name says `labels-idx1` for `images-idx3`.
pub(super) fn read_idx_pair(images: &Path) -> Result<Vec<LabelledRow>> {
    let labels = labels_of(images)?;
    let ([count, height, width], values) = read::<3>(images)?;
    let ([labelled], names) = read::<1>(&labels)?;
    if count != labelled {
        return Err(refused(&labels, format!("{labelled} labels for {count} pictures")));
    }
    if count == 0 || height == 0 || width == 0 {
        return Err(refused(images, format!("{count} pictures of {height} × {width}; expected at least one pixel")));
    }
    let rows = values.chunks_exact(height * width).zip(names).map(|(pixels, label)| LabelledRow {
        content: Content::Picture(Picture::Grey { values: pixels.to_vec(), height, width }),
        label: Label::One(label.to_string()),
    });
    Ok(rows.collect())
}

fn labels_of(images: &Path) -> Result<PathBuf> {
    let name = images.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let labels = images.with_file_name(name.replace("images", "labels").replace("idx3", "idx1"));
    if labels == images || !labels.is_file() {
        return Err(refused(images, format!("its labels are missing; expected them in {}", labels.display())));
    }
    Ok(labels)
}

/// Sizes and values of a file of rank `RANK`. Sizes are held against the length of the file before they become an allocation.
fn read<const RANK: usize>(path: &Path) -> Result<([usize; RANK], Vec<u8>)> {
    let file = File::open(path).map_err(Error::io(path))?;
    let stored = file.metadata().map_err(Error::io(path))?.len();
    let (most, mut source): (u64, Box<dyn Read>) = if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gz")) {
        (stored.saturating_mul(MOST_SHRINKING), Box::new(GzDecoder::new(file)))
    } else {
        (stored, Box::new(file))
    };
    let short = |e: std::io::Error| refused(path, format!("it ends early or is not what its name says: {e}"));
    let mut magic = [0; 4];
    source.read_exact(&mut magic).map_err(short)?;
    if magic != [0, 0, BYTES, RANK as u8] {
        return Err(refused(path, format!("expected an IDX file of bytes of rank {RANK}, found the header {magic:?}")));
    }
    let mut sizes = [0; RANK];
    for size in &mut sizes {
        let mut word = [0; 4];
        source.read_exact(&mut word).map_err(short)?;
        *size = u32::from_be_bytes(word) as usize;
    }
    let count = sizes.iter().try_fold(1_u64, |count, size| count.checked_mul(*size as u64)).filter(|n| *n <= most);
    let count = count.ok_or_else(|| refused(path, format!("sizes {sizes:?} are more than the file can hold")))?;
    let mut values = Vec::new();
    source.take(count + 1).read_to_end(&mut values).map_err(short)?;
    if values.len() as u64 != count {
        let found = if (values.len() as u64) < count { values.len().to_string() } else { "more".to_owned() };
        return Err(refused(path, format!("sizes {sizes:?} make {count} values, found {found}")));
    }
    Ok((sizes, values))
}

fn refused(path: &Path, what: String) -> Error {
    Error::Pictures { path: path.to_owned(), what }
}
