//! `cargo xtask setup`: what a backend needs on a machine without it.
//!
//! - `vulkan`: `SwiftShader`, a Vulkan device in software, taken out of Debian's `chromium-common` (only the loader is installed). It needs
//!   the correction of [`crate::corrected`].
//! - `wgpu`: Mesa's lavapipe, which runs the WGSL path.
//! - `llvm`: the static LLVM SDK that the features `cuda` and `cpu` link. Their build script would download it; this takes it from two
//!   Python wheels instead, which works wherever a package index is reachable.

use crate::archive::{Client, Package, the_file_with};
use crate::error::{Error, Result};
use crate::process;
use clap::{Args, ValueEnum};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The arguments of `setup`.
#[derive(Args)]
pub(crate) struct Arguments {
    /// What to make ready
    #[arg(required = true, value_enum)]
    parts: Vec<Part>,
}

/// What can be made ready.
#[derive(Clone, Copy, ValueEnum)]
enum Part {
    /// A Vulkan device in software: a library out of Debian's Chromium package
    Vulkan,
    /// A WebGPU device in software (Mesa's lavapipe)
    Wgpu,
    /// The LLVM SDK that the features `cuda` and `cpu` are built with
    Llvm,
}

/// The release of the SDK whose directory the build script of `tracel-llvm-bundler` looks for.
const LLVM_RELEASE: &str = "tracel-llvm-23.1.0-4";

/// The wheels that hold the SDK.
const LLVM_WHEELS: [Package; 2] = [
    Package {
        client: Client::Wheel,
        name: "mlc-llvm-static",
        version: "23.1.1.post0",
        bytes: 60_168_233,
        sha256: "dcfec888abfaa418be77d41af585805f31463584cf9c90582992c00f392c1ac5",
    },
    Package {
        client: Client::Wheel,
        name: "mlc-llvm-static-extra-targets",
        version: "23.1.1.post0",
        bytes: 31_771_021,
        sha256: "c36e834d9a4e9cf9759f27fece65711ece7a2fc2b5a96dbb15d66f5e9e787929",
    },
];

/// Environment variables for a process that is to use a device made here.
pub(crate) type Environment = Vec<(&'static str, String)>;

/// Runs `setup`; standard output is for `eval`.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    for part in &arguments.parts {
        match part {
            Part::Vulkan => print_exports(&vulkan()?),
            Part::Wgpu => print_exports(&wgpu()?),
            Part::Llvm => eprintln!("LLVM SDK at {}", llvm()?.display()),
        }
    }
    Ok(())
}

fn print_exports(environment: &Environment) {
    let words: Vec<_> = environment.iter().map(|(name, value)| format!("{name}='{value}'")).collect();
    println!("export {}", words.join(" "));
}

/// The environment in which Vulkan has a device: nothing when the machine has its own or the user named one, else `SwiftShader`'s.
pub(crate) fn vulkan_environment() -> Result<Environment> {
    if std::env::var_os("VK_DRIVER_FILES").is_some() || has_hardware_vulkan() { Ok(Vec::new()) } else { vulkan() }
}

/// The environment in which the WGSL path has a device, as [`vulkan_environment`], but with lavapipe.
pub(crate) fn wgpu_environment() -> Result<Environment> {
    if has_hardware_vulkan() { Ok(Vec::new()) } else { wgpu() }
}

/// Whether there is a graphics device and a driver manifest that can belong to it.
fn has_hardware_vulkan() -> bool {
    let nodes = [("/dev/dri", "renderD"), ("/dev", "nvidia0")];
    let device = nodes.iter().any(|(directory, prefix)| files_in(directory).any(|name| name.starts_with(prefix)));
    let manifests = ["/usr/share/vulkan/icd.d", "/etc/vulkan/icd.d"].into_iter().flat_map(files_in);
    !cfg!(target_os = "linux") || device && manifests.into_iter().any(|name| !name.starts_with("lvp"))
}

/// The names in a directory; none when it does not exist.
fn files_in(directory: &str) -> impl Iterator<Item = String> {
    fs::read_dir(directory).into_iter().flatten().filter_map(|entry| entry.ok()?.file_name().into_string().ok())
}

/// Makes `SwiftShader` ready and returns the environment that selects it. About 30 MB down, 6 MB kept; nothing when it is there already.
pub(crate) fn vulkan() -> Result<Environment> {
    apt_install(&["libvulkan1"])?;
    let directory = home("XDG_CACHE_HOME", ".cache")?.join("peft/swiftshader");
    let manifest = directory.join("vk_swiftshader_icd.json");
    if !manifest.exists() {
        eprintln!("fetching SwiftShader out of Debian's chromium-common");
        let work = work_directory(&directory)?;
        // The newest version: Debian's archive keeps no older one that could be pinned. apt checks its signature.
        apt_update()?;
        process::capture(
            Command::new("apt-get").args(["download", "-qq", "chromium-common"]).current_dir(work.path()),
        )?;
        let package = the_file_with(work.path(), &["deb"])?;
        let unpacked = work.path().join("unpacked");
        process::capture(Command::new("dpkg").arg("-x").arg(&package).arg(&unpacked))?;
        install_swiftshader(&unpacked.join("usr/lib/chromium"), &work.path().join("ready"), &directory)?;
        replace(&work.path().join("ready"), &directory)?;
    }
    Ok(driver(&manifest))
}

/// Copies the library and its manifest into `staging`; the manifest names the library where it will lie in the end, in `directory`.
fn install_swiftshader(from: &Path, staging: &Path, directory: &Path) -> Result<()> {
    fs::create_dir_all(staging).map_err(|source| Error::io("create", staging, source))?;
    let library = staging.join("libvk_swiftshader.so");
    let packaged = from.join("libvk_swiftshader.so");
    fs::copy(&packaged, &library).map_err(|source| Error::io("copy", &packaged, source))?;
    let packaged = from.join("vk_swiftshader_icd.json");
    let text = fs::read_to_string(&packaged).map_err(|source| Error::io("read", &packaged, source))?;
    let malformed = |problem: String| Error::Malformed { path: packaged.clone(), problem };
    let mut manifest: serde_json::Value = serde_json::from_str(&text).map_err(|error| malformed(error.to_string()))?;
    let Some(path) = manifest.pointer_mut("/ICD/library_path") else {
        return Err(malformed("a Vulkan driver manifest has an ICD.library_path, this one has none".to_owned()));
    };
    *path = directory.join("libvk_swiftshader.so").to_string_lossy().into();
    let installed = staging.join("vk_swiftshader_icd.json");
    fs::write(&installed, manifest.to_string()).map_err(|source| Error::io("write", &installed, source))
}

/// Installs Mesa's lavapipe and returns the environment that selects it.
pub(crate) fn wgpu() -> Result<Environment> {
    apt_install(&["libvulkan1", "mesa-vulkan-drivers"])?;
    let directory = "/usr/share/vulkan/icd.d";
    let manifest = files_in(directory).find(|name| name.starts_with("lvp_icd")).ok_or_else(|| Error::Malformed {
        path: directory.into(),
        problem: "mesa-vulkan-drivers is installed, but there is no lvp_icd*.json".to_owned(),
    })?;
    Ok(driver(&Path::new(directory).join(manifest)))
}

/// The variables that make the Vulkan loader use one driver; the second is the name that loaders before 1.3.207 know.
fn driver(manifest: &Path) -> Environment {
    let path = manifest.to_string_lossy().into_owned();
    vec![("VK_DRIVER_FILES", path.clone()), ("VK_ICD_FILENAMES", path)]
}

/// Installs the LLVM SDK where Burn's build looks for it. About 90 MB down, 390 MB kept; nothing when it is there already.
pub(crate) fn llvm() -> Result<PathBuf> {
    apt_install(&["zlib1g-dev", "libzstd-dev"])?;
    let directory = home("XDG_DATA_HOME", ".local/share")?.join("tracel").join(LLVM_RELEASE);
    let mark = ".tracel-llvm-installed";
    if directory.join(mark).exists() {
        return Ok(directory);
    }
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        return Err(Error::Failed(
            "the LLVM SDK's wheels are for Linux on x86-64 only; Burn's build downloads it elsewhere".to_owned(),
        ));
    }
    let work = work_directory(&directory)?;
    for package in &LLVM_WHEELS {
        eprintln!("fetching {} {} ({} MB)", package.name, package.version, package.bytes / 1_000_000);
        let download = work.path().join(package.name);
        fs::create_dir(&download).map_err(|source| Error::io("create", &download, source))?;
        let wheel = package.download(&download)?;
        package.unpack(&wheel, &work.path().join("unpacked"))?;
    }
    let sdk = work.path().join("unpacked/mlc_llvm_static/static");
    let programs = sdk.join("bin");
    // Python's zip reader drops the permission bits.
    process::capture(Command::new("chmod").arg("--recursive").arg("+x").arg(&programs))?;
    process::capture(Command::new(programs.join("llvm-config")).args(["--link-static", "--version"]))?;
    fs::write(sdk.join(mark), "").map_err(|source| Error::io("write", &sdk, source))?;
    replace(&sdk, &directory)?;
    Ok(directory)
}

/// A directory of the user: `$variable`, or else `~/fallback`.
fn home(variable: &str, fallback: &str) -> Result<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set(variable).or_else(|| Some(set("HOME")?.join(fallback))).ok_or_else(|| {
        Error::Failed(format!("neither {variable} nor HOME is set; set one to a directory that may be written"))
    })
}

/// A temporary directory beside `target`, so that what it holds can be moved there in one step.
pub(crate) fn work_directory(target: &Path) -> Result<tempfile::TempDir> {
    let parent = target.parent().unwrap_or(target);
    fs::create_dir_all(parent).map_err(|source| Error::io("create", parent, source))?;
    tempfile::Builder::new()
        .prefix(".work-")
        .tempdir_in(parent)
        .map_err(|source| Error::io("create a directory in", parent, source))
}

/// Puts `ready` in the place of `target`; a reader sees the old directory, none for a moment, or the whole new one.
pub(crate) fn replace(ready: &Path, target: &Path) -> Result<()> {
    if target.exists() {
        fs::remove_dir_all(target).map_err(|source| Error::io("remove", target, source))?;
    }
    fs::rename(ready, target).map_err(|source| Error::io("move into place", target, source))
}

/// Makes sure that `python3 -m pip` works.
pub(crate) fn need_pip() -> Result<()> {
    if process::succeeds(Command::new("python3").args(["-m", "pip", "--version"])) {
        return Ok(());
    }
    apt_install(&["python3-pip"])
}

/// Updates apt's lists, once in the life of this process.
pub(crate) fn apt_update() -> Result<()> {
    static UPDATED: OnceLock<()> = OnceLock::new();
    if UPDATED.get().is_none() {
        // Without the right to update, the lists that are there have to do.
        if let Some(mut command) = as_root("apt-get") {
            process::capture(command.args(["update", "-qq"]))?;
        }
        UPDATED.get_or_init(|| ());
    }
    Ok(())
}

/// Installs the Debian packages that are not installed yet.
fn apt_install(packages: &[&str]) -> Result<()> {
    let missing: Vec<_> = packages.iter().copied().filter(|package| !is_installed(package)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let refused = |why: &str| Error::Packages { packages: missing.join(" "), why: why.to_owned() };
    if !process::succeeds(Command::new("apt-get").arg("--version")) {
        return Err(refused("this system has no apt-get"));
    }
    let Some(mut command) = as_root("apt-get") else {
        return Err(refused("this user is neither root nor allowed to use sudo without a password"));
    };
    eprintln!("installing {}", missing.join(" "));
    apt_update()?;
    command.args(["-o", "Dpkg::Use-Pty=0", "install", "-y", "-qq", "--no-install-recommends"]).args(&missing);
    process::capture(&mut command).map(drop)
}

/// Whether a Debian package is installed.
fn is_installed(package: &str) -> bool {
    let query =
        process::capture(Command::new("dpkg-query").args(["--show", "--showformat=${db:Status-Status}", package]));
    query.is_ok_and(|status| status == "installed")
}

/// The program as root runs it, asking no questions: directly, or through sudo where that needs no password; `None` where neither works.
fn as_root(program: &str) -> Option<Command> {
    if process::capture(Command::new("id").arg("-u")).is_ok_and(|id| id.trim() == "0") {
        let mut command = Command::new(program);
        command.env("DEBIAN_FRONTEND", "noninteractive");
        return Some(command);
    }
    process::succeeds(Command::new("sudo").args(["-n", "true"])).then(|| {
        let mut command = Command::new("sudo");
        command.args(["-n", "env", "DEBIAN_FRONTEND=noninteractive", program]);
        command
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_manifest_names_the_library_where_it_will_lie() {
        let work = tempfile::tempdir().unwrap();
        let (from, staging) = (work.path().join("from"), work.path().join("staging"));
        fs::create_dir(&from).unwrap();
        fs::write(from.join("libvk_swiftshader.so"), "library").unwrap();
        fs::write(from.join("vk_swiftshader_icd.json"), r#"{"ICD":{"library_path":"./libvk_swiftshader.so"}}"#)
            .unwrap();
        install_swiftshader(&from, &staging, Path::new("/final")).unwrap();
        let manifest = fs::read_to_string(staging.join("vk_swiftshader_icd.json")).unwrap();
        assert_eq!(manifest, r#"{"ICD":{"library_path":"/final/libvk_swiftshader.so"}}"#);
    }

    #[test]
    fn a_directory_is_replaced_whole() {
        let work = tempfile::tempdir().unwrap();
        let (ready, target) = (work.path().join("ready"), work.path().join("target"));
        for (directory, file) in [(&ready, "new"), (&target, "old")] {
            fs::create_dir(directory).unwrap();
            fs::write(directory.join(file), "").unwrap();
        }
        replace(&ready, &target).unwrap();
        assert!(target.join("new").exists() && !target.join("old").exists() && !ready.exists());
    }
}
