//! The schema document `docs/control-api.schema.json`, generated from the types.

use schemars::SchemaGenerator;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use super::error::ErrorKind;
use super::method::{self, Method};

/// Collects methods into the document.
pub(super) struct Visitor<'a> {
    generator: &'a mut SchemaGenerator,
    methods: Map<String, Value>,
}

impl Visitor<'_> {
    /// Adds `M`.
    pub(super) fn method<M: Method>(&mut self) {
        let entry = json!({
            "description": M::ABOUT,
            "params": self.generator.subschema_for::<M::Params>(),
            "result": self.generator.subschema_for::<M::Result>(),
        });
        self.methods.insert(M::NAME.to_owned(), entry);
    }
}

/// The JSON schema of all methods, parameters, results and errors.
pub fn document() -> Value {
    let mut generator = SchemaSettings::draft2020_12().into_generator();
    let mut visitor = Visitor {
        generator: &mut generator,
        methods: Map::new(),
    };
    method::for_each(&mut visitor);
    let methods = visitor.methods;
    let kinds = generator.subschema_for::<ErrorKind>();
    let errors: Vec<Value> = ErrorKind::ALL
        .iter()
        .map(|kind| json!({ "code": kind.code(), "kind": kind }))
        .collect();
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "ringway control API",
        "description": "JSON-RPC 2.0 over a Unix stream socket, one message (or batch) a line. \
            Parameters are by name. Rx and Tx are from the switch's point of view.",
        "transport": {
            "default_socket": crate::config::DEFAULT_CONTROL,
            "max_line_bytes": crate::rpc::MAX_LINE,
            "max_batch_requests": crate::rpc::MAX_BATCH,
            "max_connections": crate::rpc::MAX_CONNECTIONS,
        },
        "methods": methods,
        "error": {
            "type": "object",
            "required": ["code", "message", "data"],
            "properties": {
                "code": { "type": "integer" },
                "message": { "type": "string", "description": "What is wrong, in one line." },
                "data": {
                    "type": "object",
                    "required": ["kind", "hint"],
                    "properties": {
                        "kind": kinds,
                        "hint": { "type": "string", "description": "What to do, in one line." },
                    },
                },
            },
        },
        "errors": errors,
        "$defs": generator.take_definitions(true),
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

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
        assert_eq!(methods.len(), method::names().len());
        for name in method::names() {
            assert!(methods.contains_key(*name), "{name}");
        }
    }
}
