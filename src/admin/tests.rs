//! The admin server over real loopback TCP, asked by its own client and by hand-written requests.

use std::sync::Mutex;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::client::{AdminUrl, AskError, ask_events, ask_status, give_order};
use super::control::{Order, OrderOutcome, OrderRefused};
use super::*;
use crate::status::tests::sample;
use crate::status::{EventSeverity, EventStatus, StatusReport, VolumeState};

/// Says always the same, and keeps the orders it gets.
struct Fixed(Mutex<StatusReport>, Mutex<Vec<Order>>);

impl StatusSource for Fixed {
    fn status(&self) -> StatusReport {
        self.0.lock().expect("not poisoned").clone()
    }

    fn events(&self) -> Vec<EventStatus> {
        let (volume, text) = ("vol0".to_owned(), "back, 3 records behind".to_owned());
        vec![EventStatus { time_ms: 7, volume, replica: Some("b".to_owned()), severity: EventSeverity::Info, text }]
    }
}

impl Control for Fixed {
    fn order(&self, volume: &str, order: Order) -> OrderOutcome {
        let known = volume == "vol0";
        if known {
            self.1.lock().expect("not poisoned").push(order);
        }
        let message = format!("there is no volume {volume}");
        let refused = OrderRefused { is_unknown: true, message, remedy: Some("name vol0".to_owned()) };
        Box::pin(async move { if known { Ok("done".to_owned()) } else { Err(refused) } })
    }
}

const JSON: &str = "Content-Type: application/json\r\n";

struct Running {
    address: SocketAddr,
    source: Arc<Fixed>,
    stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
}

impl Running {
    async fn start() -> Running {
        let any = "127.0.0.1:0".parse().expect("an address");
        let server = AdminServer::bind(&any).await.expect("a free port");
        let address = server.local_address();
        let source = Arc::new(Fixed(Mutex::new(sample()), Mutex::default()));
        let (stop, stopping) = watch::channel(false);
        let task = tokio::spawn(server.serve(Arc::clone(&source) as Arc<dyn Control>, stopping));
        Running { address, source, stop, task }
    }

    fn url(&self) -> AdminUrl {
        self.address.to_string().parse().expect("an admin URL")
    }

    /// Everything that the server sends in answer to `request`, up to its end of the connection.
    async fn send(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(self.address).await.expect("connect");
        stream.write_all(request.as_bytes()).await.expect("send");
        let mut answer = String::new();
        // A server that cuts a bad request off may reset the connection after its answer.
        let _ = stream.read_to_string(&mut answer).await;
        answer
    }

    async fn post(&self, path: &str, headers: &str, body: &str) -> String {
        let length = body.len();
        self.send(&format!("POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Content-Length: {length}\r\n\r\n{body}")).await
    }

    async fn get(&self, path: &str) -> String {
        self.send(&format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n")).await
    }
}

#[tokio::test]
async fn the_client_gets_the_report_that_the_engine_gave() {
    let running = Running::start().await;
    let report = ask_status(&running.url()).await.expect("a report");
    assert_eq!(report, sample());
}

#[tokio::test]
async fn health_is_200_while_serving_and_503_with_the_reason_otherwise() {
    let running = Running::start().await;
    let answer = running.get("/healthz").await;
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("\r\n\r\nok\n"), "{answer}");
    running.source.0.lock().expect("not poisoned").volumes[0].state = VolumeState::Frozen;
    let answer = running.get("/healthz").await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(answer.ends_with("volume vol0 is frozen (replicas: c syncing)\n"), "{answer}");
}

#[tokio::test]
async fn metrics_name_volume_and_replica() {
    let running = Running::start().await;
    let answer = running.get("/metrics").await;
    assert!(answer.contains("content-type: application/openmetrics-text; version=1.0.0"));
    for line in [
        r#"nbdcast_volume_serving{volume="vol0"} 1"#,
        r#"nbdcast_volume_size_bytes{volume="vol0"} 10737418240"#,
        r#"nbdcast_volume_writes_total{volume="vol0"} 9001"#,
        r#"nbdcast_volume_block_statuses_total{volume="vol0"} 17"#,
        r#"nbdcast_volume_caches_total{volume="vol0"} 5"#,
        r#"nbdcast_volume_latency_seconds{volume="vol0",operation="write",quantile="0.99"} 2.5"#,
        r#"nbdcast_volume_blocked{volume="vol0"} 0"#,
        r#"nbdcast_volume_written_bytes_total{volume="vol0"} 36868096"#,
        r#"nbdcast_replica_resync_done_bytes{volume="vol0",replica="c"} 536870912"#,
        r#"nbdcast_replica_resync_bytes_per_second{volume="vol0",replica="c"} 104857600"#,
        r#"nbdcast_replica_state{volume="vol0",replica="c",state="syncing"} 1"#,
        r#"nbdcast_replica_state{volume="vol0",replica="c",state="member"} 0"#,
        r#"nbdcast_replica_lag_seconds{volume="vol0",replica="b"} 1.25"#,
        r#"nbdcast_replica_checksum_errors_total{volume="vol0",replica="b"} 2"#,
        "# EOF",
    ] {
        assert!(answer.lines().any(|found| found == line), "no `{line}` in\n{answer}");
    }
}

#[tokio::test]
async fn other_paths_and_methods_are_refused() {
    let running = Running::start().await;
    let answer = running.get("/nothing").await;
    assert!(answer.starts_with("HTTP/1.1 404 ") && answer.contains("/healthz"), "{answer}");
    let answer = running.send("POST /status HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
    assert!(answer.contains("allow: GET, HEAD"), "{answer}");
    let answer = running.send("HEAD /status HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("\r\n\r\n"), "{answer}");
}

#[tokio::test]
async fn events_are_given_as_json() {
    let running = Running::start().await;
    let answer = running.get("/events").await;
    let event = r#"[{"time_ms":7,"volume":"vol0","replica":"b","severity":"info","text":"back, 3 records behind"}]"#;
    assert!(answer.ends_with(&format!("\r\n\r\n{event}")), "{answer}");
}

#[tokio::test]
async fn an_order_is_carried_out_and_answered() {
    let running = Running::start().await;
    let answer = running.post("/volumes/vol0/resize", JSON, r#"{"size":"2GiB"}"#).await;
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with(r#"{"message":"done"}"#), "{answer}");
    let answer = running.send("DELETE /volumes/vol0/replicas/b HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    let remove = Order::RemoveReplica { replica: "b".to_owned() };
    let size = listener_agent::config::ByteSize::gib(2);
    assert_eq!(*running.source.1.lock().expect("not poisoned"), [Order::Resize { size }, remove]);

    let answer = running.post("/volumes/other/resize", JSON, r#"{"size":"2GiB"}"#).await;
    assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
    assert!(answer.ends_with("\r\n\r\nthere is no volume other\n  remedy: name vol0\n"), "{answer}");
}

#[tokio::test]
async fn the_client_gives_orders_and_gets_their_refusals() {
    let running = Running::start().await;
    let body = serde_json::json!({ "full": true });
    let said = give_order(&running.url(), Method::POST, "/volumes/vol0/replicas/b/resync", &body).await;
    assert_eq!(said.expect("an answer"), "done");
    let error = give_order(&running.url(), Method::POST, "/volumes/x/replicas/b/resync", &body).await;
    let error = error.expect_err("no such volume");
    assert_eq!((error.to_string().as_str(), error.remedy()), ("there is no volume x", Some("name vol0")));
    let events = ask_events(&running.url()).await.expect("events");
    assert_eq!(events[0].replica.as_deref(), Some("b"));
}

#[tokio::test]
async fn orders_that_a_web_page_could_give_are_refused() {
    let running = Running::start().await;
    let body = r#"{"size":"2GiB"}"#;
    for (header, code) in [
        ("Content-Type: text/plain\r\n", 415),
        ("", 415),
        ("Content-Type: application/json\r\nOrigin: http://localhost:10808\r\n", 403),
        ("Content-Type: application/json\r\nOrigin: null\r\n", 403),
    ] {
        let answer = running.post("/volumes/vol0/resize", header, body).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {code} ")), "{header}: {answer}");
    }
    let delete = "DELETE /volumes/vol0/replicas/b HTTP/1.1\r\nHost: x\r\nOrigin: http://evil\r\n\r\n";
    assert!(running.send(delete).await.starts_with("HTTP/1.1 403 "));
    assert!(running.source.1.lock().expect("not poisoned").is_empty(), "nothing was ordered");
}

#[tokio::test]
async fn orders_that_make_no_sense_are_refused_before_anyone_sees_them() {
    let running = Running::start().await;
    let long = format!(r#"{{"size":"{}"}}"#, "1".repeat(BODY_BYTES_MAX));
    for (path, body, code) in [
        ("/volumes/vol0/resize", "", 400),
        ("/volumes/vol0/resize", "{", 400),
        ("/volumes/vol0/resize", r#"{"size":"2GB"}"#, 400),
        ("/volumes/vol0/resize", long.as_str(), 413),
        ("/volumes/vol0/activate", r#"{"without":["b"],"accept_data_loss":false}"#, 400),
        ("/volumes/vol0/replicas/b", "{}", 405),
        ("/volumes/vol0/nothing", "{}", 404),
    ] {
        let answer = running.post(path, JSON, body).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {code} ")), "{path}: {answer}");
    }
    let answer = running.get("/volumes/vol0/resize").await;
    assert!(answer.starts_with("HTTP/1.1 405 ") && answer.contains("allow: POST"), "{answer}");
    assert!(running.source.1.lock().expect("not poisoned").is_empty(), "nothing was ordered");
}

#[tokio::test]
async fn a_head_without_end_is_cut_off() {
    let running = Running::start().await;
    let endless = format!("GET /status HTTP/1.1\r\nX: {}", "x".repeat(2 * HEAD_BYTES_MAX));
    let answer = running.send(&endless).await;
    assert!(answer.starts_with("HTTP/1.1 431 ") || answer.is_empty(), "{answer}");
    let headers: String = (0..=HEADERS_MAX).map(|n| format!("h{n}: x\r\n")).collect();
    let answer = running.send(&format!("GET /status HTTP/1.1\r\n{headers}\r\n")).await;
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    ask_status(&running.url()).await.expect("others are served");
}

#[tokio::test]
async fn a_busy_port_is_named_with_a_remedy() {
    let running = Running::start().await;
    let busy = running.address.to_string().parse().expect("an address");
    let error = AdminServer::bind(&busy).await.expect_err("the port is taken");
    let start = format!("cannot listen at the admin address {}: ", running.address);
    assert!(error.to_string().starts_with(&start), "{error}");
    assert!(error.remedy().contains("choose another port"));
}

#[tokio::test]
async fn a_stopped_server_frees_its_port_and_the_client_says_that_nobody_answers() {
    let running = Running::start().await;
    let url = running.url();
    running.stop.send_replace(true);
    running.task.await.expect("the server ends");
    let error = ask_status(&url).await.expect_err("nobody listens");
    assert!(matches!(error, AskError::Connect { .. }), "{error}");
    assert!(error.to_string().starts_with(&format!("no engine answers at {url}: ")));
    assert!(error.remedy().is_some_and(|remedy| remedy.contains("is `nbdcast serve` running?")));
    let address = running.address.to_string().parse().expect("an address");
    AdminServer::bind(&address).await.expect("the port is free again");
}

#[tokio::test]
async fn something_that_is_no_engine_is_told_apart() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let url: AdminUrl = listener.local_addr().expect("an address").to_string().parse().expect("a URL");
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.expect("a client");
        stream.write_all(b"NBDMAGICIHAVEOPT").await.expect("send");
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest).await;
    });
    let error = ask_status(&url).await.expect_err("not HTTP");
    assert!(matches!(error, AskError::Exchange { .. }), "{error}");
}

#[test]
fn admin_urls_are_read_with_and_without_their_scheme() {
    for (text, url) in [
        ("http://127.0.0.1:10808", "http://127.0.0.1:10808"),
        ("http://localhost:1/", "http://localhost:1"),
        ("[::1]:10808", "http://[::1]:10808"),
        ("0.0.0.0:10808", "http://127.0.0.1:10808"),
    ] {
        assert_eq!(text.parse::<AdminUrl>().expect(text).to_string(), url);
    }
    for text in ["https://h:1", "http://h:1/status", "http://h", "unix:/a", ""] {
        text.parse::<AdminUrl>().expect_err(text);
    }
}
