//! The schema document `docs/control-api.schema.json`, generated from the types.

use schemars::SchemaGenerator;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use crate::error::ErrorKind;
use crate::event::Event;
use crate::method::{self, Method};

/// Collects methods into the document.
pub(crate) struct Visitor<'a> {
    generator: &'a mut SchemaGenerator,
    methods: Map<String, Value>,
}

impl Visitor<'_> {
    /// Adds `M`.
    pub(crate) fn method<M: Method>(&mut self) {
        let entry = json!({
            "description": M::ABOUT,
            "params": self.generator.subschema_for::<M::Params>(),
            "result": self.generator.subschema_for::<M::Result>(),
        });
        self.methods.insert(M::NAME.to_owned(), entry);
    }
}

/// The JSON schema of all methods, parameters, results and errors, and what there is to know of the
/// `transport`.
pub fn document(transport: &Value) -> Value {
    let mut generator = SchemaSettings::draft2020_12().into_generator();
    let mut visitor = Visitor {
        generator: &mut generator,
        methods: Map::new(),
    };
    method::for_each(&mut visitor);
    let methods = visitor.methods;
    let event = generator.subschema_for::<Event>();
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
        "transport": transport,
        "methods": methods,
        "notifications": {
            "event": {
                "description": "What the daemon sends after its answer to monitor.start, without \
                    being asked: one event each. `ringway monitor -j` prints them, one a line.",
                "params": event,
            },
        },
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
