//! Errors that know what the operator can do about them.

/// An error with a hint.
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

/// The hint of an error, if it has one.
pub(crate) fn hint_of(error: &anyhow::Error) -> Option<&str> {
    error
        .chain()
        .find_map(|cause| cause.downcast_ref::<Hinted>())
        .map(|error| &*error.hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hint_survives_context() {
        let error = hinted("iperf3 is missing", "install it").context("preparing");
        assert_eq!(hint_of(&error), Some("install it"));
        assert_eq!(hint_of(&anyhow::anyhow!("other")), None);
    }
}
