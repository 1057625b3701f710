//! Devices by name: the one place that knows which backends this program was built with.

use burn::tensor::{Device, DeviceType, Tensor, TensorData};

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
/// When there is no such name, it is not compiled in, this machine has no such device, or it multiplies matrices wrongly; the hint says what
/// to do.
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
    let device = devices.get(index).ok_or_else(|| match devices.len() {
        0 => Error::refused(format!("--device {name}: this machine has no such device"), backend.needs),
        count => {
            Error::usage(format!("--device {name}: this machine has {count}"), format!("--device {kind}:{}", count - 1))
        }
    })?;
    if multiplies(device) {
        Ok(device.clone())
    } else {
        let hint = "its driver or Burn's kernels for it are at fault: update the driver, or choose another --device";
        Err(Error::refused(format!("--device {name}: this device multiplies matrices wrongly"), hint))
    }
}

/// Whether the device gets the product of two matrices of small whole numbers right, which f32 holds exactly. There are drivers for which
/// Burn's kernels do not (see DESIGN.md), and nothing that follows could be trusted.
fn multiplies(device: &Device) -> bool {
    let [m, k, n] = [8, 16, 32];
    let whole = |count: usize, step: usize| (0..count).map(|at| (at * step % 7) as f32 - 3.0).collect::<Vec<_>>();
    let (a, b) = (whole(m * k, 3), whole(k * n, 5));
    let entry = |row: usize, column: usize| (0..k).map(|at| a[row * k + at] * b[at * n + column]).sum::<f32>();
    let expected = (0..m * n).map(|at| entry(at / n, at % n));
    let tensor = |values: &[f32], shape| Tensor::<2>::from_data(TensorData::new(values.to_vec(), shape), device);
    let found = tensor(&a, [m, k]).matmul(tensor(&b, [k, n])).try_into_data();
    found.is_ok_and(|found| found.iter::<f32>().eq(expected))
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
