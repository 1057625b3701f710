//! What an operation is on each backend.

/// Implements an operation on every backend but autodiff: on those of this machine's memory by the function of the module `native` that has the method's
/// name, on tensors `by` which it is able to compute; else, and on CubeCL's, by that of the module `plain`.
macro_rules! on_backends {
    ($operation:ident { $(fn $method:ident($($name:ident: $type:ty),* $(,)?) -> $output:ty, by [$($by:ident),*];)* }) => {
        $crate::backends::on_backends!(@backend "flex" (burn::backend::Flex) $operation {
            $(fn $method($($name: $type),*) -> $output, by [$($by),*];)*
        });
        $crate::backends::on_backends!(@backend "ndarray" (burn::backend::NdArray) $operation {
            $(fn $method($($name: $type),*) -> $output, by [$($by),*];)*
        });

        #[cfg(feature = "cube")]
        impl $operation for burn_cubecl::CubeBackend {}
    };
    (@backend $feature:literal ($backend:ty) $operation:ident {
        $(fn $method:ident($($name:ident: $type:ty),*) -> $output:ty, by [$($by:ident),*];)*
    }) => {
        #[cfg(feature = $feature)]
        impl $operation for $backend {
            $(fn $method($($name: $type),*) -> $output {
                if <Self as $crate::host::Host>::computes(&[$(&$by),*]) {
                    native::$method::<Self>($($name),*)
                } else {
                    plain::$method::<Self>($($name),*)
                }
            })*
        }
    };
}
pub(crate) use on_backends;
