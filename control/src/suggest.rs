//! Near misses: what someone may have meant.

use ringway_api::kinds_with;

/// Similarity (Jaro-Winkler, 0 to 1) from which a candidate is worth naming; clap's own bound.
const LIKELY: f64 = 0.7;

/// The candidate most like `word`, if one is like it at all.
pub(crate) fn nearest<'a>(
    word: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(word, candidate), candidate))
        .filter(|(likeness, _)| *likeness >= LIKELY)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, candidate)| candidate)
}

/// What serde says of a key or value that it does not know: "unknown field `a`, expected `b`".
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Unknown<'a> {
    /// The key or value.
    pub word: &'a str,
    /// What it could have been.
    pub known: Vec<&'a str>,
    /// Whether it is a key.
    pub is_key: bool,
}

impl<'a> Unknown<'a> {
    /// Reads serde's message, if it is one of these.
    pub(crate) fn read(message: &'a str) -> Option<Self> {
        let is_key = message.starts_with("unknown field `");
        if !is_key && !message.starts_with("unknown variant `") {
            return None;
        }
        let mut quoted = message.split('`').skip(1).step_by(2);
        Some(Self {
            word: quoted.next()?,
            known: quoted.collect(),
            is_key,
        })
    }

    /// A line that says what is wrong.
    pub(crate) fn what(&self) -> String {
        let what = if self.is_key { "key" } else { "value" };
        format!("unknown {what} `{}`", self.word)
    }

    /// A line that says what to write instead.
    pub(crate) fn hint(&self) -> String {
        // What all kinds of port have: the word may be a setting of another kind.
        let is_port = ["mtu", "fdb_limit", "flood_limit", "pins"]
            .iter()
            .all(|setting| self.known.contains(setting));
        let kinds = if is_port {
            kinds_with(self.word)
        } else {
            Vec::new()
        };
        if !kinds.is_empty() {
            let kinds: Vec<_> = kinds.iter().map(|kind| kind.as_str()).collect();
            return format!("it belongs to kind {}; leave it out", kinds.join(" and "));
        }
        match nearest(self.word, self.known.iter().copied()) {
            Some(known) => format!("did you mean `{known}`?"),
            None if self.known.is_empty() => "leave it out".into(),
            None => format!("known here: {}", self.known.join(", ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typing_error_finds_the_word() {
        let keys = ["queues", "listen", "connect", "mtu"];
        assert_eq!(nearest("quees", keys), Some("queues"));
        assert_eq!(nearest("lisen", keys), Some("listen"));
        assert_eq!(nearest("zzz", keys), None);
    }

    #[test]
    fn serdes_messages_are_understood() {
        let message = "unknown field `quees`, expected one of `kind`, `queues`";
        let unknown = Unknown::read(message).unwrap();
        assert_eq!((unknown.word, unknown.is_key), ("quees", true));
        assert_eq!(unknown.hint(), "did you mean `queues`?");
        let unknown = Unknown::read("unknown variant `bridge`, expected `vhost-user` or `tap`");
        assert_eq!(unknown.unwrap().hint(), "known here: vhost-user, tap");
        let none = Unknown::read("unknown field `a`, there are no fields").unwrap();
        assert_eq!(none.hint(), "leave it out");
        assert_eq!(Unknown::read("invalid type: string"), None);
    }
}
