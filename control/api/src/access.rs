//! Who may open the file of a socket: whose it is, and its mode.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::value::{BadValue, shown, text};

/// Longest name of a user or group (useradd(8)).
const MAX_ACCOUNT_NAME: usize = 32;

/// The name of a user or group, or its number. Whether it exists is for the system to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccountName(String);

text!(AccountName, "minLength": 1, "maxLength": MAX_ACCOUNT_NAME);

impl FromStr for AccountName {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        // What a field of passwd(5) or a command line can't hold, or a person not see.
        let bad = |c: char| matches!(c, ':' | ',' | '/') || c.is_whitespace() || c.is_control();
        let fits = (1..=MAX_ACCOUNT_NAME).contains(&text.len());
        if fits && !text.contains(bad) && !text.starts_with('-') {
            return Ok(Self(text.to_owned()));
        }
        Err(BadValue::new(
            format!("{} can't name a user or group", shown(text)),
            "name it as `getent passwd` or `getent group` does, or give its number",
        ))
    }
}

impl AccountName {
    /// Its number, if that is what was given.
    pub fn number(&self) -> Option<u32> {
        // The greatest means "leave it" to chown(2).
        self.0.parse().ok().filter(|number| *number != u32::MAX)
    }
}

/// The permissions of a socket's file, in octal as chmod(1) takes them. To connect takes the right
/// to write (unix(7)).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SocketMode(u16);

impl SocketMode {
    /// For its owner and its group.
    pub const OWNER_AND_GROUP: Self = Self(0o660);

    /// The bits.
    pub const fn bits(self) -> u16 {
        self.0
    }
}

impl fmt::Display for SocketMode {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{:04o}", self.0)
    }
}

impl fmt::Debug for SocketMode {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "SocketMode({self})")
    }
}

impl FromStr for SocketMode {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let is_octal = (3..=4).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
        let bits = u16::from_str_radix(text, 8)
            .ok()
            .filter(|bits| *bits <= 0o777);
        bits.filter(|_| is_octal).map(Self).ok_or_else(|| {
            BadValue::new(
                format!("{} is no mode of a socket", shown(text)),
                "give three octal digits as chmod(1) takes them, for example 0660",
            )
        })
    }
}

impl Serialize for SocketMode {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SocketMode {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = Cow::<'de, str>::deserialize(from)?;
        text.parse().map_err(BadValue::into_serde)
    }
}

impl JsonSchema for SocketMode {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        "SocketMode".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "pattern": "^0?[0-7]{3}$" })
    }
}

/// Whose a socket's file is, and who may open it. What is not said is as it is made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SocketAccess {
    /// Its user; `None` leaves the process's.
    pub owner: Option<AccountName>,
    /// Its group; `None` leaves the process's, or the directory's if that has the set-group-ID bit.
    pub group: Option<AccountName>,
    /// Its permissions; `None` is [`SocketMode::OWNER_AND_GROUP`].
    pub mode: Option<SocketMode>,
}

impl SocketAccess {
    /// This, and what it doesn't say as `other` says it.
    #[must_use]
    pub fn or(&self, other: &Self) -> Self {
        let name = |ours: &Option<AccountName>, other: &Option<AccountName>| {
            ours.as_ref().or(other.as_ref()).cloned()
        };
        Self {
            owner: name(&self.owner, &other.owner),
            group: name(&self.group, &other.group),
            mode: self.mode.or(other.mode),
        }
    }

    /// Whether anything is said.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_octal_and_of_permissions_alone() {
        for (text, bits) in [("660", 0o660), ("0600", 0o600), ("0777", 0o777), ("000", 0)] {
            let mode: SocketMode = text.parse().unwrap();
            assert_eq!(mode.bits(), bits);
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
        for text in [
            "",
            "6",
            "66",
            "0o660",
            "+660",
            "1777",
            "0680",
            "00660",
            "rw-rw----",
            "660 ",
        ] {
            let error = text.parse::<SocketMode>().expect_err(text);
            assert!(error.hint.contains("0660"), "{error}");
        }
    }

    #[test]
    fn accounts_are_names_or_numbers() {
        for (text, number) in [
            ("kvm", None),
            ("libvirt-qemu", None),
            ("0", Some(0)),
            ("64055", Some(64_055)),
        ] {
            let name: AccountName = text.parse().unwrap();
            assert_eq!(name.number(), number);
        }
        assert_eq!("4294967295".parse::<AccountName>().unwrap().number(), None);
        for text in [
            "",
            "a:b",
            "a b",
            "a\0b",
            "a/b",
            "-1",
            "a\n",
            &"x".repeat(33),
        ] {
            text.parse::<AccountName>().expect_err(text);
        }
    }

    #[test]
    fn what_is_not_said_is_as_the_other_says_it() {
        let all = SocketAccess {
            owner: "0".parse().ok(),
            group: "kvm".parse().ok(),
            mode: "0600".parse().ok(),
        };
        let mode = SocketAccess {
            mode: "0666".parse().ok(),
            ..SocketAccess::default()
        };
        assert_eq!(SocketAccess::default().or(&all), all);
        assert_eq!(mode.or(&all).mode, mode.mode);
        assert_eq!(mode.or(&all).group, all.group);
        assert!(SocketAccess::default().is_empty() && !mode.is_empty());
    }
}
