//! A module whose name in paths is not the name of its field.

use std::borrow::Cow;
use std::ops::Deref;

use burn::module::{Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor};
use burn::tensor::Device;

/// A module that takes the place of its field in paths by a name of its own: one that no field can have (`self`), several levels at once
/// (`attention.output.dense`), one that is chosen when the model is built, or none.
///
/// So mathematics that `transformers` spells differently from family to family is written once, and the names are a table.
///
/// ```
/// use burn::{module::Module, nn::{Linear, LinearConfig}, tensor::Device};
/// use peft_core::{Named, scan};
///
/// #[derive(Module, Debug)]
/// struct Attention { query: Named<Linear> }
///
/// let query = LinearConfig::new(4, 4).init(&Device::flex());
/// let attention = Attention { query: Named::new("self.query", query) };
/// assert_eq!(scan(&attention).sites[0].path, "self.query");
/// assert_eq!(attention.query.weight.dims(), [4, 4]);
/// ```
#[derive(Clone, Debug)]
pub struct Named<M> {
    name: Cow<'static, str>,
    inner: M,
}

/// What visitors see as the container of the level that renames the one above it.
pub(crate) const NAMED: &str = "Named";

impl<M> Named<M> {
    /// `inner` under `name`, which may have dots, or be empty.
    pub fn new(name: impl Into<Cow<'static, str>>, inner: M) -> Self {
        Self { name: name.into(), inner }
    }

    /// The same module under another name.
    #[must_use]
    pub fn renamed(self, name: impl Into<Cow<'static, str>>) -> Self {
        Self { name: name.into(), inner: self.inner }
    }

    /// The module without its name.
    pub fn into_inner(self) -> M {
        self.inner
    }

    /// The module of what `change` makes of it, under the same name.
    fn map_inner(self, change: impl FnOnce(M) -> M) -> Self {
        Self { name: self.name, inner: change(self.inner) }
    }
}

impl<M> Deref for Named<M> {
    type Target = M;

    fn deref(&self) -> &M {
        &self.inner
    }
}

impl<T: Module> Module for Named<T> {
    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        visitor.enter_module(&self.name, NAMED);
        self.inner.visit(visitor);
        visitor.exit_module(&self.name, NAMED);
    }

    fn map<M: ModuleMapper>(self, mapper: &mut M) -> Self {
        mapper.enter_module(&self.name, NAMED);
        let Self { name, inner } = self;
        let inner = inner.map(mapper);
        mapper.exit_module(&name, NAMED);
        Self { name, inner }
    }

    fn to_device(self, device: &Device) -> Self {
        self.map_inner(|inner| inner.to_device(device))
    }

    fn fork(self, device: &Device) -> Self {
        self.map_inner(|inner| inner.fork(device))
    }

    fn collect_devices(&self, devices: Devices) -> Devices {
        self.inner.collect_devices(devices)
    }

    fn materialize(self) -> Self {
        self.map_inner(Module::materialize)
    }

    fn valid(&self) -> Self {
        Self { name: self.name.clone(), inner: self.inner.valid() }
    }

    fn train(self) -> Self {
        self.map_inner(Module::train)
    }
}

impl<M: ModuleDisplay> ModuleDisplayDefault for Named<M> {
    fn content(&self, content: Content) -> Option<Content> {
        content.add_single(&self.inner).optional()
    }
}

impl<M: ModuleDisplay> ModuleDisplay for Named<M> {}
