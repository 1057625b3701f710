//! What an operation is on each backend.

/// Implements an operation on every backend but autodiff: on those of this machine's memory by the function of the module `native` that has the method's
/// name, on tensors `by` which it is able to compute, else by that of the module `plain`; on CubeCL's by that of the module `plain`, or after `with kernels`
/// by that of the module `cube` where it is able to.
macro_rules! on_backends {
    ($operation:ident { $($methods:tt)* }) => {
        $crate::backends::on_backends!(@host $operation { $($methods)* });

        #[cfg(feature = "cube")]
        impl $operation for burn_cubecl::CubeBackend {}
    };
    ($operation:ident with kernels { $($methods:tt)* }) => {
        $crate::backends::on_backends!(@host $operation { $($methods)* });
        $crate::backends::on_backends!(@backend "cube" (burn_cubecl::CubeBackend) cube $operation { $($methods)* });
    };
    (@host $operation:ident { $($methods:tt)* }) => {
        $crate::backends::on_backends!(@backend "flex" (burn::backend::Flex) native $operation { $($methods)* });
        $crate::backends::on_backends!(@backend "ndarray" (burn::backend::NdArray) native $operation { $($methods)* });
    };
    (@backend $feature:literal ($backend:ty) $module:ident $operation:ident {
        $(fn $method:ident($($name:ident: $type:ty),* $(,)?) -> $output:ty, by [$($by:ident),*];)*
    }) => {
        #[cfg(feature = $feature)]
        impl $operation for $backend {
            $(fn $method($($name: $type),*) -> $output {
                if $crate::backends::on_backends!(@able $module $($by),*) {
                    $crate::backends::on_backends!(@call $module $method($($name),*))
                } else {
                    plain::$method::<Self>($($name),*)
                }
            })*
        }
    };
    (@able native $($by:ident),*) => { <Self as $crate::host::Host>::computes(&[$(&$by),*]) };
    (@able cube $($by:ident),*) => { $crate::cube::computes(&[$(&$by),*]) };
    (@call native $method:ident($($name:ident),*)) => { native::$method::<Self>($($name),*) };
    (@call cube $method:ident($($name:ident),*)) => { cube::$method($($name),*) };
}
pub(crate) use on_backends;
