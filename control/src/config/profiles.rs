//! Profiles: what the ports of sockets that plug themselves have, but for the socket.

use ringway_api::{PortName, VhostUserConfig};
use serde::Deserialize;
use toml::Spanned;
use toml::de::{DeTable, DeValue, ValueDeserializer};

use super::ConfigError;
use super::file::Places;
use crate::auto::Profiles;

/// In the place of the socket's path, while a profile is read.
const ANY_SOCKET: &str = "/any.sock";

/// Keys of a port that a profile can't have: they belong to one socket.
const OF_ONE_PORT: [&str; 6] = ["kind", "listen", "connect", "owner", "group", "mode"];

pub(super) fn check(
    profiles: Option<Spanned<DeValue<'_>>>,
    places: &Places<'_>,
) -> Result<Profiles, ConfigError> {
    let tables = match profiles.map(Spanned::into_inner) {
        None => DeTable::new(),
        Some(DeValue::Table(tables)) => tables,
        Some(_) => {
            let hint = "give each profile a table, as [profiles.web]";
            return Err(places.error(&["profiles"], "this is no table".into(), hint));
        }
    };
    let mut profiles = Profiles::new();
    for (name, settings) in tables {
        let key = name.get_ref();
        let path = ["profiles", key];
        let name: PortName = key
            .parse()
            .map_err(|bad: ringway_api::BadValue| places.error(&path, bad.reason, bad.hint))?;
        let (span, mut settings) = (settings.span(), settings.into_inner());
        if let DeValue::Table(fields) = &mut settings {
            if let Some(field) = OF_ONE_PORT
                .iter()
                .find(|field| fields.contains_key(**field))
            {
                let what = format!("a profile has no `{field}`");
                let hint = "its ports are vhost-user ports, each at the socket that is found";
                return Err(places.error(&["profiles", key, field], what, hint));
            }
            let at = span.clone();
            let socket = DeValue::String(ANY_SOCKET.into());
            fields.insert(
                Spanned::new(at.clone(), "connect".into()),
                Spanned::new(at, socket),
            );
        }
        let start = Some(span.start);
        let settings = ValueDeserializer::from(Spanned::new(span, settings));
        let profile = VhostUserConfig::deserialize(settings);
        let profile = profile.map_err(|error| places.refused(&error, start))?;
        profiles.insert(name.to_string(), profile);
    }
    Ok(profiles)
}

#[cfg(test)]
mod tests {
    use crate::config::{Config, ConfigError};

    fn refused(text: &str) -> ConfigError {
        Config::parse(text).unwrap_err()
    }

    #[test]
    fn a_profile_is_a_port_without_a_socket() {
        let text = "[auto]\ndirectory = \"/run/ringway/auto\"\n[profiles.web]\nqueues = 2\n";
        let config = Config::parse(text).unwrap();
        assert_eq!(config.auto, Some("/run/ringway/auto".into()));
        assert_eq!(config.profiles["web"].queues.get(), 2);
    }

    #[test]
    fn what_a_profile_can_not_have_is_told_with_its_line() {
        let error = refused("[profiles.web]\nqueues = 2\nlisten = \"/a\"\n");
        assert_eq!(
            (error.line, &*error.what),
            (Some(3), "profiles.web.listen: a profile has no `listen`")
        );
        let error = refused("[profiles.web]\nqeues = 2\n");
        assert_eq!(error.line, Some(2));
        assert!(error.hint.contains("did you mean `queues`"), "{error:?}");
        assert_eq!(refused("[profiles.web]\nqueues = 0\n").line, Some(2));
        assert_eq!(refused("[profiles]\nweb = 1\n").line, Some(2));
        assert!(refused("[profiles.\"a/b\"]\n").what.contains("a/b"));
        assert!(refused("profiles = 1\n").what.contains("no table"));
        let error = refused("[auto]\ndirectory = \"auto\"\n");
        assert!(error.what.contains("absolute"), "{error:?}");
    }
}
