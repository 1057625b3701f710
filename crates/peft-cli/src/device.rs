//! Devices by name: the one place that knows which backends this program was built with.

use burn::tensor::{Device, DeviceType};

use crate::{Error, Result};

struct Backend {
    name: &'static str,
    feature: &'static str,
    /// The devices of this machine, best first; `None` when the backend is not compiled in.
    devices: Option<fn() -> Vec<Device>>,
    /// What a machine without such a device lacks.
    needs: &'static str,
}

macro_rules! backend {
    ($name:literal, $feature:tt, $kind:ident, $needs:literal) => {
        Backend {
            name: $name,
            feature: $feature,
            #[cfg(feature = $feature)]
            devices: Some(|| Device::enumerate(DeviceType::$kind).to_vec()),
            #[cfg(not(feature = $feature))]
            devices: None,
            needs: $needs,
        }
    };
}

const BACKENDS: [Backend; 7] = [
    backend!("cpu", "flex", Flex, "every machine has one"),
    backend!("ndarray", "ndarray", NdArray, "every machine has one"),
    backend!("cubecl-cpu", "cpu", Cpu, "every machine has one"),
    backend!(
        "vulkan",
        "vulkan",
        Vulkan,
        "install a Vulkan driver (the GPU's, or the software one of `cargo xtask setup vulkan`)"
    ),
    backend!(
        "wgpu",
        "wgpu",
        Wgpu,
        "install a graphics driver with Vulkan, Metal or DirectX 12 (or `cargo xtask setup wgpu`)"
    ),
    backend!("metal", "metal", Metal, "Metal needs macOS on Apple hardware; elsewhere use --device vulkan"),
    backend!(
        "cuda",
        "cuda",
        Cuda,
        "install the NVIDIA driver and the CUDA toolkit; without an NVIDIA GPU use --device vulkan"
    ),
];

/// Opens a device: `cpu`, `ndarray`, `cubecl-cpu`, `vulkan`, `wgpu`, `metal` or `cuda`, with an optional `:index`.
///
/// # Errors
/// When there is no such name, it is not compiled in, or this machine has no such device; the hint says how to get it.
pub fn open(name: &str) -> Result<Device> {
    let (kind, index) = match name.split_once(':') {
        Some((kind, index)) => {
            let bad = |_| {
                Error::usage(
                    format!("--device {name}: expected a number after the colon"),
                    format!("--device {kind}:0"),
                )
            };
            (kind, index.parse::<usize>().map_err(bad)?)
        }
        None => (name, 0),
    };
    let backend = BACKENDS.iter().find(|backend| backend.name == kind).ok_or_else(|| {
        let names: Vec<&str> = BACKENDS.iter().map(|backend| backend.name).collect();
        Error::usage(
            format!("--device {name}: there is no such device"),
            format!("one of {}, with an optional :index", names.join(", ")),
        )
    })?;
    let devices = backend.devices.ok_or_else(|| {
        let hint = format!(
            "rebuild with `--features {}`: cargo build --release -p peft-cli --features {}",
            backend.feature, backend.feature
        );
        Error::usage(format!("--device {name}: this program was built without it"), hint)
    })?();
    devices.get(index).cloned().ok_or_else(|| match devices.len() {
        0 => Error::refused(format!("--device {name}: this machine has no such device"), backend.needs),
        count => {
            Error::usage(format!("--device {name}: this machine has {count}"), format!("--device {kind}:{}", count - 1))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::open;

    #[test]
    fn names_are_checked_before_anything_is_opened() {
        assert!(open("cpu").is_ok());
        for (name, expected) in [
            ("gpu", "one of cpu, ndarray, cubecl-cpu, vulkan, wgpu, metal, cuda"),
            ("cpu:x", "--device cpu:0"),
            ("cpu:7", "--device cpu:0"),
        ] {
            let error = open(name).unwrap_err();
            assert!(error.hint().contains(expected), "{name}: {}", error.hint());
            assert_eq!(error.exit_code(), 2);
        }
    }
}
