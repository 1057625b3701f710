//! Fields of a module that say something to visitors and hold no parameter.

/// Makes a `Copy` type a module without parameters, which enters a container whose name is the expression and leaves it: a [`ModuleVisitor`] is shown
/// names and parameters only, so this is how a module tells it anything else.
///
/// [`ModuleVisitor`]: burn::module::ModuleVisitor
#[macro_export]
macro_rules! marker_module {
    ($marker:ty, |$this:ident| $container:expr) => {
        impl ::burn::module::Module for $marker {
            fn visit<V: ::burn::module::ModuleVisitor>(&self, visitor: &mut V) {
                let $this = self;
                let container = $container;
                visitor.enter_module("", container.as_ref());
                visitor.exit_module("", container.as_ref());
            }

            fn map<M: ::burn::module::ModuleMapper>(self, _mapper: &mut M) -> Self {
                self
            }

            fn to_device(self, _device: &::burn::tensor::Device) -> Self {
                self
            }

            fn fork(self, _device: &::burn::tensor::Device) -> Self {
                self
            }

            fn collect_devices(&self, devices: ::burn::module::Devices) -> ::burn::module::Devices {
                devices
            }

            fn materialize(self) -> Self {
                self
            }

            fn valid(&self) -> Self {
                *self
            }

            fn train(self) -> Self {
                self
            }
        }

        impl ::burn::module::ModuleDisplayDefault for $marker {
            fn content(&self, content: ::burn::module::Content) -> Option<::burn::module::Content> {
                content.add_formatted(&format!("{self:?}")).optional()
            }
        }

        impl ::burn::module::ModuleDisplay for $marker {}
    };
}
