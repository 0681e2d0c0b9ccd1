//! The codec: a line in, a line out, no I/O.

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

use super::Stream;
use crate::api::{ApiError, ErrorKind};

/// Most requests in a batch: many times what any client of ours sends.
pub const MAX_BATCH: usize = 64;

/// Once a batch's answers exceed this many bytes its remaining requests are refused, unexecuted:
/// 64 listings of a large forwarding database would be gigabytes.
pub const MAX_BATCH_RESPONSE: usize = 8 << 20;

/// What a method call comes to.
#[derive(Debug)]
pub enum Reply {
    /// A result as JSON.
    Result(Box<RawValue>),
    /// An empty result, which the connection's stream follows.
    Stream(Stream),
}

/// Answers a method call. `params` is absent or a JSON object.
pub type Handler = dyn Fn(&str, Option<&RawValue>) -> Result<Reply, ApiError> + Send + Sync;

/// The same for the moment.
type Call<'a> = dyn Fn(&str, Option<&RawValue>) -> Result<Reply, ApiError> + 'a;

/// What a line comes to.
#[derive(Debug, Default)]
pub struct Answer {
    /// The response without a newline, or `None` if the line holds notifications only.
    pub line: Option<String>,
    /// What the connection is from now on, once the response is written.
    pub stream: Option<Stream>,
}

impl From<String> for Answer {
    fn from(line: String) -> Self {
        Self {
            line: Some(line),
            stream: None,
        }
    }
}

/// Answers one line.
pub fn answer(line: &[u8], handler: &Handler) -> Answer {
    let value = match parse(line) {
        Ok(value) => value,
        Err(error) => return error_line(&error).into(),
    };
    if !value.get().starts_with('[') {
        return answer_one(value, handler);
    }
    let requests: Vec<&RawValue> = match serde_json::from_str(value.get()) {
        Ok(requests) => requests,
        Err(error) => return error_line(&parse_error(&error.to_string())).into(),
    };
    Answer {
        line: answer_batch(&requests, handler),
        stream: None,
    }
}

/// The response to something that has no request: `id` is null.
pub fn error_line(error: &ApiError) -> String {
    response(None, Err(error))
}

fn parse(line: &[u8]) -> Result<&RawValue, ApiError> {
    let text = std::str::from_utf8(line).map_err(|error| {
        parse_error(&format!("invalid UTF-8 after byte {}", error.valid_up_to()))
    })?;
    serde_json::from_str(text).map_err(|error| parse_error(&error.to_string()))
}

fn parse_error(reason: &str) -> ApiError {
    ApiError::new(
        ErrorKind::ParseError,
        format!("not a line of JSON: {reason}"),
        "send one JSON-RPC 2.0 request in UTF-8 on each line",
    )
}

fn answer_batch(requests: &[&RawValue], handler: &Handler) -> Option<String> {
    if requests.is_empty() {
        return Some(error_line(&invalid_request("an empty batch")));
    }
    if requests.len() > MAX_BATCH {
        let message = format!("a batch of {} requests", requests.len());
        return Some(error_line(&too_large(message)));
    }
    let mut all = String::new();
    for request in requests {
        let one = if all.len() <= MAX_BATCH_RESPONSE {
            answer_one(request, &|method, params| match handler(method, params)? {
                Reply::Stream(_) => Err(no_stream_here(method)),
                result => Ok(result),
            })
        } else {
            let refuse = |_: &str, _: Option<&RawValue>| {
                Err(too_large("the answers before this one are too long".into()))
            };
            answer_one(request, &refuse)
        };
        if let Some(one) = one.line {
            all.push(if all.is_empty() { '[' } else { ',' });
            all.push_str(&one);
        }
    }
    if all.is_empty() {
        return None;
    }
    all.push(']');
    Some(all)
}

fn no_stream_here(method: &str) -> ApiError {
    let message = format!("{method} in a batch");
    let hint = "send it by itself, on a connection of its own";
    ApiError::new(ErrorKind::InvalidRequest, message, hint)
}

fn too_large(message: String) -> ApiError {
    let hint = format!(
        "send at most {MAX_BATCH} requests in a batch, with answers of {MAX_BATCH_RESPONSE} bytes"
    );
    ApiError::new(ErrorKind::BatchTooLarge, message, hint)
}

/// A request object (JSON-RPC 2.0, 4). An absent `id` makes it a notification; null is an id.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Request<'a> {
    jsonrpc: String,
    method: String,
    #[serde(borrow, default)]
    params: Option<&'a RawValue>,
    #[serde(borrow, default, deserialize_with = "present")]
    id: Option<&'a RawValue>,
}

/// Keeps a null apart from an absent field.
fn present<'de, D: Deserializer<'de>>(from: D) -> Result<Option<&'de RawValue>, D::Error> {
    <&RawValue>::deserialize(from).map(Some)
}

/// A stream that is asked for by a notification is not begun: who asks does not expect an answer.
fn answer_one(raw: &RawValue, handler: &Call<'_>) -> Answer {
    let request: Request<'_> = match parse_request(raw) {
        Ok(request) => request,
        Err(error) => return error_line(&error).into(),
    };
    let outcome =
        check_params(request.params).and_then(|()| handler(&request.method, request.params));
    let Some(id) = request.id else {
        return Answer::default();
    };
    match outcome {
        Ok(Reply::Result(result)) => response(Some(id), Ok(&result)).into(),
        Ok(Reply::Stream(stream)) => Answer {
            line: Some(response(Some(id), Ok(&no_result()))),
            stream: Some(stream),
        },
        Err(error) => response(Some(id), Err(&error)).into(),
    }
}

fn no_result() -> Box<RawValue> {
    // An empty object is JSON.
    RawValue::from_string("{}".into()).unwrap_or_else(|_| RawValue::NULL.to_owned())
}

fn parse_request(raw: &RawValue) -> Result<Request<'_>, ApiError> {
    if !raw.get().starts_with('{') {
        return Err(invalid_request("it is no object"));
    }
    let request: Request<'_> =
        serde_json::from_str(raw.get()).map_err(|error| invalid_request(&describe(&error)))?;
    if request.jsonrpc != "2.0" {
        return Err(invalid_request("`jsonrpc` is not \"2.0\""));
    }
    let id = request.id.map_or("null", RawValue::get);
    if id.starts_with(['{', '[', 't', 'f']) {
        return Err(invalid_request("`id` is no string, number or null"));
    }
    Ok(request)
}

/// serde_json's text without its position, which is that in a fragment of the line.
pub(crate) fn describe(error: &serde_json::Error) -> String {
    let text = error.to_string();
    match text.rfind(" at line ") {
        Some(at) => text.get(..at).unwrap_or(&text).to_owned(),
        None => text,
    }
}

fn invalid_request(reason: &str) -> ApiError {
    ApiError::new(
        ErrorKind::InvalidRequest,
        format!("not a JSON-RPC 2.0 request: {reason}"),
        r#"send {"jsonrpc":"2.0","id":1,"method":"port.list"}"#,
    )
}

/// Parameters by position would be read in the order of declaration: refuse them.
fn check_params(params: Option<&RawValue>) -> Result<(), ApiError> {
    match params {
        Some(raw) if !raw.get().starts_with('{') => Err(ApiError::new(
            ErrorKind::InvalidParams,
            "`params` is no object",
            "give parameters by name",
        )),
        _ => Ok(()),
    }
}

#[derive(Serialize)]
struct Response<'a> {
    jsonrpc: &'static str,
    id: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<&'a RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<ErrorObject<'a>>,
}

#[derive(Serialize)]
struct ErrorObject<'a> {
    code: i32,
    message: &'a str,
    data: ErrorData<'a>,
}

#[derive(Serialize)]
struct ErrorData<'a> {
    kind: ErrorKind,
    hint: &'a str,
}

fn response(id: Option<&RawValue>, outcome: Result<&RawValue, &ApiError>) -> String {
    let error = outcome.err().map(|error| ErrorObject {
        code: error.kind.code(),
        message: &error.message,
        data: ErrorData {
            kind: error.kind,
            hint: &error.hint,
        },
    });
    let response = Response {
        jsonrpc: "2.0",
        id,
        result: outcome.ok(),
        error,
    };
    serde_json::to_string(&response).unwrap_or_else(|error| {
        // Strings and raw JSON always serialise.
        tracing::error!(%error, "a response can't be written");
        String::new()
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn echo(method: &str, params: Option<&RawValue>) -> Result<Reply, ApiError> {
        let text = match method {
            "echo" => params.map_or("null", RawValue::get).to_owned(),
            "big" => format!("\"{}\"", "x".repeat(3 << 20)),
            "stream" => {
                let (bell, _) = std::os::unix::net::UnixStream::pair().unwrap();
                return Ok(Reply::Stream(Stream::new(bell.into(), |_| false)));
            }
            _ => return Err(ApiError::new(ErrorKind::MethodNotFound, "no", "none")),
        };
        Ok(Reply::Result(RawValue::from_string(text).unwrap()))
    }

    fn ask(line: &str) -> Option<Value> {
        let answer = answer(line.as_bytes(), &echo).line;
        answer.map(|line| serde_json::from_str(&line).unwrap())
    }

    fn code(line: &str) -> i64 {
        ask(line).unwrap()["error"]["code"].as_i64().unwrap()
    }

    #[test]
    fn a_request_is_answered_with_its_id_as_it_was_written() {
        for id in [
            "1",
            "\"a\\u0041\"",
            "null",
            "1.50",
            "99999999999999999999999",
        ] {
            let line =
                format!(r#"{{"jsonrpc":"2.0","id":{id},"method":"echo","params":{{"a":1}}}}"#);
            let expected = format!(r#"{{"jsonrpc":"2.0","id":{id},"result":{{"a":1}}}}"#);
            assert_eq!(answer(line.as_bytes(), &echo).line.unwrap(), expected);
        }
    }

    #[test]
    fn a_notification_has_no_answer_even_if_it_fails() {
        assert_eq!(ask(r#"{"jsonrpc":"2.0","method":"echo"}"#), None);
        assert_eq!(ask(r#"{"jsonrpc":"2.0","method":"nope"}"#), None);
        assert_eq!(ask(r#"[{"jsonrpc":"2.0","method":"echo"}]"#), None);
    }

    #[test]
    fn a_stream_begins_for_one_request_by_itself_and_not_in_a_batch() {
        let one = r#"{"jsonrpc":"2.0","id":1,"method":"stream"}"#;
        let begun = answer(one.as_bytes(), &echo);
        assert_eq!(
            begun.line.unwrap(),
            r#"{"jsonrpc":"2.0","id":1,"result":{}}"#
        );
        assert!(begun.stream.is_some());
        let refused = answer(format!("[{one}]").as_bytes(), &echo);
        assert!(refused.line.unwrap().contains("in a batch"));
        assert!(refused.stream.is_none());
        let unasked = answer(br#"{"jsonrpc":"2.0","method":"stream"}"#, &echo);
        assert!(unasked.line.is_none() && unasked.stream.is_none());
    }

    #[test]
    fn a_line_that_is_no_json_is_a_parse_error() {
        for line in ["", "{", "nul", "{\"a\":1}x", "[1,", "\u{feff}{}"] {
            assert_eq!(code(line), -32700, "{line}");
        }
        let response = answer(b"{\"jsonrpc\":\"\xff\"}", &echo).line.unwrap();
        assert!(
            response.contains("-32700") && response.contains("UTF-8"),
            "{response}"
        );
    }

    #[test]
    fn json_that_is_no_request_is_invalid() {
        for line in [
            "1",
            "null",
            "\"port.list\"",
            "[]",
            "{}",
            r#"{"jsonrpc":"1.0","id":1,"method":"echo"}"#,
            r#"{"jsonrpc":2.0,"id":1,"method":"echo"}"#,
            r#"{"jsonrpc":"2.0","id":1}"#,
            r#"{"jsonrpc":"2.0","id":1,"method":7}"#,
            r#"{"jsonrpc":"2.0","id":{},"method":"echo"}"#,
            r#"{"jsonrpc":"2.0","id":[1],"method":"echo"}"#,
            r#"{"jsonrpc":"2.0","id":true,"method":"echo"}"#,
            r#"{"jsonrpc":"2.0","id":1,"method":"echo","extra":1}"#,
            r#"{"jsonrpc":"2.0","id":1,"id":2,"method":"echo"}"#,
        ] {
            assert_eq!(code(line), -32600, "{line}");
        }
    }

    #[test]
    fn positional_parameters_are_refused() {
        let line = r#"{"jsonrpc":"2.0","id":1,"method":"echo","params":[1]}"#;
        assert_eq!(code(line), -32602);
        let line = r#"{"jsonrpc":"2.0","id":1,"method":"echo","params":7}"#;
        assert_eq!(code(line), -32602);
    }

    #[test]
    fn a_batch_is_answered_in_order_and_bad_members_one_by_one() {
        let batch = r#"[{"jsonrpc":"2.0","id":1,"method":"echo"}, 7,
            {"jsonrpc":"2.0","method":"echo"}, {"jsonrpc":"2.0","id":2,"method":"nope"}]"#;
        let answers = ask(batch).unwrap();
        let ids: Vec<_> = answers
            .as_array()
            .unwrap()
            .iter()
            .map(|a| &a["id"])
            .collect();
        assert_eq!(ids, [&json!(1), &json!(null), &json!(2)]);
        assert_eq!(answers[1]["error"]["code"], -32600);
        assert_eq!(answers[2]["error"]["code"], -32601);
    }

    #[test]
    fn a_batch_is_bounded_in_requests_and_in_bytes() {
        let many = format!("[{}]", vec!["1"; MAX_BATCH + 1].join(","));
        assert_eq!(code(&many), i64::from(ErrorKind::BatchTooLarge.code()));
        let big = [r#"{"jsonrpc":"2.0","id":1,"method":"big"}"#; 5].join(",");
        let answers = ask(&format!("[{big}]")).unwrap();
        assert!(answers[2]["result"].is_string());
        assert_eq!(answers[3]["error"]["data"]["kind"], "batch_too_large");
        assert_eq!(answers[4]["error"]["data"]["kind"], "batch_too_large");
    }

    #[test]
    fn deep_nesting_is_answered_and_does_not_exhaust_the_stack() {
        let deep = "[".repeat(500_000);
        assert_eq!(code(&deep), -32700);
        let deep = format!("{}{}", "[".repeat(400_000), "]".repeat(400_000));
        assert_eq!(ask(&deep).unwrap()[0]["error"]["code"], -32600);
        let line = format!(r#"{{"jsonrpc":"2.0","id":{deep},"method":"echo"}}"#);
        assert_eq!(code(&line), -32600);
    }
}
