//! Laws of the configuration and of attaching.

use burn::tensor::DType;
use peft_core::{Error, Method, Problem, attach};

use super::Subject;
use crate::{Finding, Outcome, Stack};

/// The configuration survives its JSON.
pub(super) fn config<M: Method>(subject: &Subject<'_, M>) -> Outcome {
    let json = serde_json::to_value(subject.method())?;
    let again = serde_json::to_value(serde_json::from_value::<M>(json.clone())?)?;
    if json == again { Ok(Finding::Holds) } else { Err(format!("{json} became {again}").into()) }
}

/// A value that makes no sense is refused, and the error names its field.
pub(super) fn bad_value<M: Method>(subject: &Subject<'_, M>) -> Outcome {
    let (field, value) = &subject.laws.bad_value;
    let mut json = serde_json::to_value(subject.method())?;
    json[field] = value.clone();
    let message = match serde_json::from_value::<M>(json) {
        Err(e) => e.to_string(),
        Ok(method) => match attach(subject.base(), &method, 0) {
            Err(e @ Error::Config { .. }) => e.to_string(),
            Err(e) => return Err(format!("{field} = {value}: expected Error::Config, found {e}").into()),
            Ok(_) => return Err(format!("{field} = {value} is accepted").into()),
        },
    };
    if message.contains(field) { Ok(Finding::Holds) } else { Err(format!("does not name {field}: {message}").into()) }
}

/// A second adapter in the same weight is refused.
pub(super) fn attach_twice<M: Method>(subject: &Subject<'_, M>) -> Outcome {
    match attach(subject.attached()?, subject.method(), 0) {
        Err(Error::Attach { problems, .. })
            if problems.iter().all(|problem| matches!(problem, Problem::AlreadyAdapted { .. })) =>
        {
            Ok(Finding::Holds)
        }
        Err(e) => Err(format!("expected `AlreadyAdapted`, found {e}").into()),
        Ok(_) => Err("it is accepted".into()),
    }
}

/// Targets that match nothing are refused, and the error lists the nearest name first.
pub(super) fn attach_nothing<M: Method>(subject: &Subject<'_, M>) -> Outcome {
    match attach(subject.base(), &subject.retargeted(&["dwon"])?, 0) {
        Err(Error::Attach { problems, .. }) => match &problems[..] {
            [Problem::NoMatch { near, .. }] if near.first().is_some_and(|name| name == "down") => Ok(Finding::Holds),
            _ => Err(format!("expected `NoMatch` with `down` nearest to `dwon`, found {problems:?}").into()),
        },
        Err(e) => Err(format!("expected `NoMatch`, found {e}").into()),
        Ok(_) => Err("it is accepted".into()),
    }
}

/// A model that calls `forward` on its layers is accepted exactly when the method's weight form is the whole method.
pub(super) fn unaware<M: Method>(subject: &Subject<'_, M>) -> Outcome {
    let lacks = subject.weight_form_lacks()?;
    let unaware = Stack::new(&subject.device, DType::F32, false);
    match (lacks, attach(unaware, subject.method(), 0)) {
        (None, Ok(_)) => Ok(Finding::Holds),
        (Some(_), Err(Error::Attach { problems, .. }))
            if problems.iter().all(|problem| matches!(problem, Problem::NotAware { .. })) =>
        {
            Ok(Finding::Holds)
        }
        (Some(reason), Ok(_)) => Err(format!("accepted, though {reason}").into()),
        (_, Err(e)) => Err(e.into()),
    }
}
