//! What the operator can do about an error.

use ringway_control::rpc::CallError;

use crate::process::ProcessError;
use crate::synth::LoadError;

/// An error of one line with a hint.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
struct Hinted {
    what: String,
    hint: String,
}

/// An error of one line and what to do about it.
pub(crate) fn hinted(what: impl Into<String>, hint: impl Into<String>) -> anyhow::Error {
    Hinted {
        what: what.into(),
        hint: hint.into(),
    }
    .into()
}

/// The hint of the first cause that has one.
pub(crate) fn hint_of(error: &anyhow::Error) -> Option<String> {
    error.chain().find_map(|cause| {
        if let Some(error) = cause.downcast_ref::<Hinted>() {
            Some(error.hint.clone())
        } else if let Some(error) = cause.downcast_ref::<ProcessError>() {
            error.hint()
        } else if let Some(CallError::Refused { hint, .. }) = cause.downcast_ref() {
            Some(hint.clone()).filter(|hint| !hint.is_empty())
        } else {
            let error = cause.downcast_ref::<LoadError>()?;
            error.hint().map(str::to_owned)
        }
    })
}

/// The error and its hint in one line.
pub(crate) fn with_hint(error: &anyhow::Error) -> String {
    let hint = hint_of(error).map_or_else(String::new, |hint| format!(" ({hint})"));
    format!("{error:#}{hint}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_survives_context_whatever_error_has_it() {
        let missing = ProcessError::Missing {
            program: "iperf3".into(),
            hint: "install it".into(),
        };
        for (error, hint) in [
            (hinted("iperf3 is missing", "install it"), "install it"),
            (missing.into(), "install it"),
            (LoadError::Closed.into(), "the back-end's log may tell why"),
        ] {
            let error = error.context("preparing");
            assert_eq!(hint_of(&error).as_deref(), Some(hint));
            assert!(with_hint(&error).starts_with("preparing: "));
            assert!(with_hint(&error).ends_with(&format!(" ({hint})")));
        }
        let refused = |hint: &str| CallError::Refused {
            code: 0,
            kind: String::new(),
            message: "no".into(),
            hint: hint.into(),
        };
        assert_eq!(with_hint(&refused("ask").into()), "no (ask)");
        assert_eq!(with_hint(&refused("").into()), "no");
        let other = anyhow::anyhow!("other");
        assert_eq!(hint_of(&other), None);
        assert_eq!(with_hint(&other), "other");
    }
}
