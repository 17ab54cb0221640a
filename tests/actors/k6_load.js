// Ten callers who know the server only by its reflection: unary and streamed completions.
import { check } from 'k6';
import { Client, Stream, StatusOK } from 'k6/net/grpc';
import { Counter } from 'k6/metrics';
import encoding from 'k6/encoding';

export const options = {
  vus: 10,
  iterations: Number(__ENV.ITERATIONS),
  thresholds: { checks: ['rate==1.0'] },
};

const SERVICE = 'inference.GRPCInferenceService';
const tokens = new Counter('tokens');
const client = new Client();

function request(seed, stream) {
  return {
    model_name: 'tiny',
    id: `${seed}`,
    inputs: [
      { name: 'text_input', datatype: 'BYTES', shape: [1],
        contents: { bytes_contents: [encoding.b64encode(`caller ${seed}`)] } },
      { name: 'stream', datatype: 'BOOL', shape: [1], contents: { bool_contents: [stream] } },
    ],
    outputs: [{ name: 'num_output_tokens' }],
    parameters: {
      max_tokens: { int64_param: 5 },
      seed: { int64_param: seed },
      ignore_eos: { bool_param: true },
    },
  };
}

function count(response) {
  const output = response.outputs.find((o) => o.name === 'num_output_tokens');
  return output.contents.uintContents.reduce((sum, n) => sum + n, 0);
}

export default function () {
  client.connect(__ENV.TARGET, { plaintext: true, reflect: true });
  const seed = __VU * 1000 + __ITER;
  const answer = client.invoke(`${SERVICE}/ModelInfer`, request(seed, false));
  check(answer, {
    'unary answers': (r) => r.status === StatusOK,
    'it is this request': (r) => r.message.id === `${seed}`,
    'all tokens came': (r) => count(r.message) === 5,
    'it says which weights answered': (r) => r.trailers['dualray-weight-digest'][0] === 'abc123',
  });
  tokens.add(count(answer.message));

  const stream = new Stream(client, `${SERVICE}/ModelStreamInfer`);
  let streamed = 0;
  let strangers = 0;
  stream.on('data', (message) => {
    const response = message.inferResponse;
    strangers += response.id !== `${seed}` ? 1 : 0;
    streamed += count(response);
  });
  stream.on('end', () => {
    check(streamed, { 'all streamed tokens came': (n) => n === 5 });
    check(strangers, { 'none of another request': (n) => n === 0 });
    tokens.add(streamed);
    client.close();
  });
  stream.write(request(seed, true));
  stream.end();
}
