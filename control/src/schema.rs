//! The schema document `docs/control-api.schema.json`: the API's types, and how they are carried.

use serde_json::{Value, json};

/// The JSON schema of all methods, parameters, results and errors.
pub fn document() -> Value {
    ringway_api::document(&json!({
        "default_socket": crate::config::DEFAULT_CONTROL,
        "max_line_bytes": crate::rpc::MAX_LINE,
        "max_batch_requests": crate::rpc::MAX_BATCH,
        "max_connections": crate::rpc::MAX_CONNECTIONS,
    }))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::api::method_names;

    /// With RINGWAY_UPDATE_SCHEMA=1 in the environment this writes the file instead.
    #[test]
    fn the_committed_schema_is_what_the_types_say() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/control-api.schema.json");
        let generated = format!("{:#}\n", document());
        if std::env::var_os("RINGWAY_UPDATE_SCHEMA").is_some() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, &generated).unwrap();
        }
        let committed = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            committed == generated,
            "docs/control-api.schema.json is stale: run \
             RINGWAY_UPDATE_SCHEMA=1 cargo test -p ringway-control committed_schema"
        );
    }

    #[test]
    fn every_method_is_in_the_document_once() {
        let document = document();
        let methods = document["methods"].as_object().unwrap();
        assert_eq!(methods.len(), method_names().len());
        for name in method_names() {
            assert!(methods.contains_key(*name), "{name}");
        }
    }
}
