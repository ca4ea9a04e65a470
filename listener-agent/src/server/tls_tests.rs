//! Stories about an agent with certificates: whom it lets in, and what those that it does not let in hear.

use std::path::Path;
use std::time::Duration;

use protocol::message::{Hello, RefusedReason};
use protocol::wire::{Prefix, frame_to_agent};
use protocol::{ToAgent, ToEngine};
use rustls::pki_types::ServerName;
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::TlsConnector;

use super::AgentServer;
use crate::config::{AgentConfig, Endpoint};
use crate::connection::{ConnectionError, FrameReader, write_frames};
use crate::tls::authority::{Authority, Side, Validity};
use crate::tls::{client_config, in_words, reason};

const LIMIT: Duration = Duration::from_secs(20);

struct Agent {
    address: String,
    _data: TempDir,
    _stop: watch::Sender<bool>,
}

impl Agent {
    async fn serving(certificates: Option<&Path>, connections_max: u32) -> Agent {
        let data = tempfile::tempdir().unwrap();
        let listen = Endpoint::Tcp { host: "127.0.0.1".to_owned(), port: 0 };
        let mut config = AgentConfig::new(listen, data.path().to_owned());
        config.limits.connections_max = connections_max;
        config.tls.certificates = certificates.map(Path::to_owned);
        let server = AgentServer::bind(&config).await.expect("an agent");
        let address = server.local_address();
        let (stop, stopping) = watch::channel(false);
        tokio::spawn(server.serve(stopping));
        Agent { address, _data: data, _stop: stop }
    }

    async fn dial(&self) -> TcpStream {
        TcpStream::connect(&self.address).await.expect("the agent listens")
    }

    /// Connects with the certificates in `client` and says hello; what comes back, or why nothing does, in words.
    async fn greet(&self, client: &Path, name: &str) -> Result<ToEngine, String> {
        let connector = TlsConnector::from(client_config(client).expect("a client's certificates"));
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let connected = connector.connect(name, self.dial().await).await;
        let stream = connected.map_err(|e| words(ConnectionError::Io(e)))?;
        let (reader, writer) = tokio::io::split(stream);
        hello(reader, writer).await.map_err(words)
    }
}

fn words(error: ConnectionError) -> String {
    match &error {
        ConnectionError::Io(e) => reason(e).map_or_else(|| error.to_string(), |reason| in_words(reason, "the agent")),
        other => other.to_string(),
    }
}

async fn hello<S: AsyncRead + AsyncWrite + Unpin>(
    reader: ReadHalf<S>,
    mut writer: WriteHalf<S>,
) -> Result<ToEngine, ConnectionError> {
    let hello = ToAgent::Hello(Hello { volume: "v".parse().unwrap(), replica: "a".parse().unwrap(), engine: [1; 16] });
    write_frames(&mut writer, vec![frame_to_agent(&hello)]).await?;
    let answers = tokio::time::timeout(LIMIT, FrameReader::new(reader).read(Prefix::to_engine)).await;
    Ok(answers.expect("an answer in time")?.remove(0))
}

fn refusal(answer: Result<ToEngine, String>) -> (RefusedReason, String) {
    match answer {
        Ok(ToEngine::Refused(refused)) => (refused.reason, refused.text),
        other => panic!("not refused: {other:?}"),
    }
}

#[tokio::test]
async fn an_engine_is_let_in_by_its_name_and_no_other_client_is() {
    let authority = Authority::new();
    let agent = Agent::serving(Some(&authority.dir(Side::Server, "a")), 64).await;
    let (reason, _) = refusal(agent.greet(&authority.dir(Side::Client, "engine"), "a").await);
    assert_eq!(reason, RefusedReason::NoReplica, "the engine came as far as asking for a replica");
    let (reason, text) = refusal(agent.greet(&authority.dir(Side::Client, "guest"), "a").await);
    assert_eq!(reason, RefusedReason::Unusable);
    assert_eq!(text, "the engine's certificate is for guest; the agent's `tls.engines` allows engine");
}

#[tokio::test]
async fn an_agent_with_anothers_certificate_is_known_by_it() {
    let authority = Authority::new();
    let agent = Agent::serving(Some(&authority.dir(Side::Server, "b")), 64).await;
    let heard = agent.greet(&authority.dir(Side::Client, "engine"), "a").await;
    assert_eq!(heard, Err("the agent's certificate is for b, not for a".to_owned()));
}

#[tokio::test]
async fn certificates_of_another_ca_or_revoked_ones_are_refused() {
    let (authority, other) = (Authority::new(), Authority::new());
    let server = authority.dir(Side::Server, "a");
    let engine = authority.dir(Side::Client, "engine");
    authority.revoke(&server, "engine");
    let agent = Agent::serving(Some(&server), 64).await;
    let heard = agent.greet(&engine, "a").await.expect_err("revoked");
    assert_eq!(heard, "the agent does not accept the certificate shown to it: it was revoked");

    let stranger = other.dir(Side::Client, "engine");
    let heard = agent.greet(&stranger, "a").await.expect_err("another CA");
    assert_eq!(heard, "the agent's certificate is not of the CA in ca-cert.pem here");
    std::fs::copy(server.join("ca-cert.pem"), stranger.join("ca-cert.pem")).unwrap();
    let heard = agent.greet(&stranger, "a").await.expect_err("another CA");
    assert_eq!(heard, "the agent does not accept the certificate shown to it: it is not of its CA");
}

#[tokio::test]
async fn who_has_no_certificate_or_that_of_an_agent_or_an_old_one_is_refused() {
    let authority = Authority::new();
    let agent = Agent::serving(Some(&authority.dir(Side::Server, "a")), 64).await;
    let mut roots = rustls::RootCertStore::empty();
    for certificate in crate::tls::certificates(&authority.dir(Side::Server, "a").join("ca-cert.pem")).unwrap() {
        roots.add(certificate).unwrap();
    }
    let b = authority.dir(Side::Server, "b");
    let over = authority.dir_valid(Side::Server, "over", Validity::Over);
    for (shown, objection) in [(None, ": there was none"), (Some(b), ""), (Some(over), ": it has expired")] {
        let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let builder = builder.unwrap().with_root_certificates(roots.clone());
        let config = match shown {
            None => builder.with_no_client_auth(),
            Some(dir) => {
                use rustls::pki_types::pem::PemObject;
                let key = rustls::pki_types::PrivateKeyDer::from_pem_file(dir.join("server-key.pem")).unwrap();
                let chain = crate::tls::certificates(&dir.join("server-cert.pem")).unwrap();
                builder.with_client_auth_cert(chain, key).unwrap()
            }
        };
        let connector = TlsConnector::from(std::sync::Arc::new(config));
        let stream = connector.connect(ServerName::try_from("a").unwrap(), agent.dial().await).await.unwrap();
        let (reader, writer) = tokio::io::split(stream);
        let heard = hello(reader, writer).await.map_err(words).expect_err("refused");
        assert_eq!(heard, format!("the agent does not accept the certificate shown to it{objection}"));
    }
}

#[tokio::test]
async fn each_side_says_so_if_only_one_of_them_has_tls() {
    let authority = Authority::new();
    let encrypted = Agent::serving(Some(&authority.dir(Side::Server, "a")), 64).await;
    let (reader, writer) = tokio::io::split(encrypted.dial().await);
    let heard = hello(reader, writer).await.expect_err("plain text");
    assert!(matches!(heard, ConnectionError::SpeaksTls), "{heard}");

    let plain = Agent::serving(None, 64).await;
    let heard = plain.greet(&authority.dir(Side::Client, "engine"), "a").await;
    assert_eq!(heard, Err("the agent does not speak TLS".to_owned()));
}

#[tokio::test]
async fn one_that_never_finishes_the_handshake_makes_room_for_an_engine() {
    let authority = Authority::new();
    let agent = Agent::serving(Some(&authority.dir(Side::Server, "a")), 1).await;
    let mut silent = agent.dial().await;
    let (reason, _) = refusal(agent.greet(&authority.dir(Side::Client, "engine"), "a").await);
    assert_eq!(reason, RefusedReason::NoReplica);
    // Whatever it says now, nobody listens.
    let _ = silent.write_all(&[22, 3, 1]).await;
    let heard = tokio::time::timeout(LIMIT, FrameReader::new(silent).read(Prefix::to_engine)).await;
    heard.expect("closed in time").expect_err("it gave way");
}
